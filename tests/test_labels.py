"Fine-tuning on a grid of learning rates and weight decays."
import numpy as np, torch
from PIL import Image

from simclr_nb.data import folder_images
from simclr_nb.encoder import build_encoder
from simclr_nb.labels import finetune

HUES = {'blue': (0, 0, 255), 'green': (0, 255, 0), 'red': (255, 0, 0)}


def pictures(folder, n):
    "n noisy squares of each hue, in a folder for each."
    rng = np.random.default_rng(0)
    for name, hue in HUES.items():
        (folder/name).mkdir(parents=True)
        for i in range(n):
            x = (.6*np.array(hue) + rng.normal(40, 40, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(x).save(folder/name/f'{i}.jpg')
    return folder_images(folder)


def test_finetuning_takes_a_grid_and_skips_what_diverges(tmp_path):
    train, test = pictures(tmp_path/'train', 6), pictures(tmp_path/'test', 4)
    encoder = build_encoder('resnet18_0.25x', 32)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    out = finetune(encoder, train, test, 32, lr=[1e30, .02], wd=[0., 1e-4], steps=6, batch_size=9, fraction=.34,
                   num_workers=0)
    assert out['chosen'][0] == .02 and out['tried'][1e30, 0.] == -np.inf and len(out['tried']) == 4
    for k, v in encoder.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=0, atol=0)
