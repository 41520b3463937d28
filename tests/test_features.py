"A frozen encoder stays as it was, bit for bit, whatever mode it comes in; broken files are left out."
import random

import numpy as np, pytest, torch
from torch import nn

from simclr_nb.data import BadImage, ImageSet, load_images
from simclr_nb.features import extract_features


def cells(n): return load_images('solar_cells').subset(range(n))


@pytest.mark.parametrize('training', [True, False])
def test_no_parameter_and_no_running_statistic_moves(training):
    convolution = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.5)]
    net = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten()).train(training)
    net[1].eval()                                                  # a mode of its own
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    a, b = (extract_features(net, cells(20), 32, num_workers=0)[0] for _ in range(2))
    torch.testing.assert_close(a, b, rtol=0, atol=0)               # dropout is off
    assert not a.requires_grad and [m.training for m in net.modules()] == modes
    for k, v in net.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=0, atol=0)


def thumbnail(image): return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1)


def only_bright(image):
    "A transform may refuse an image too."
    x = thumbnail(image)
    if x.float().mean() < 80: raise BadImage('too dark')
    return x


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_transform_gives_the_same_features_in_any_number_of_processes(num_workers):
    images = cells(23)
    h, idxs = extract_features(nn.Flatten(), images, 8, batch_size=4, transform=thumbnail, num_workers=num_workers)
    assert idxs.tolist() == list(range(23))
    expected = torch.stack([thumbnail(im).flatten()/255 for im in images])        # bytes become fractions
    torch.testing.assert_close(h, expected, rtol=0, atol=0)


def test_refused_images_leave_gaps():
    images = cells(40)
    h, idxs = extract_features(nn.Flatten(), images, 8, batch_size=3, transform=only_bright, num_workers=0)
    bright = [i for i, im in enumerate(images) if thumbnail(im).float().mean() >= 80]
    assert 0 < len(bright) < 40 and idxs.tolist() == bright
    torch.testing.assert_close(h, torch.stack([thumbnail(images[i]).flatten()/255 for i in bright]))


def test_unreadable_files_at_both_ends_of_a_folder_of_features(tmp_path):
    "They are left out, and do not keep the folder from being complete."
    broken = [tmp_path/f'{i}.png' for i in range(4)]
    for f in broken: f.write_bytes(b'no image')
    images = ImageSet([*broken[:2], *cells(3).files, *broken[2:]])
    how = dict(batch_size=2, num_workers=0, out=tmp_path/'features')
    for _ in range(2):
        h, idxs = extract_features(nn.Flatten(), images, 8, **how)
        assert idxs.tolist() == [2, 3, 4]
        torch.testing.assert_close(h, extract_features(nn.Flatten(), cells(3), 8, num_workers=0)[0])


def test_a_transform_draws_no_random_number():
    torch.manual_seed(3); random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    extract_features(nn.Flatten(), cells(5), 8, transform=thumbnail, num_workers=0)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_a_model_that_returns_two_things_is_no_encoder():
    class Model(nn.Module):
        def forward(self, x): return x.flatten(1), x.mean((2, 3))
    with pytest.raises(ValueError, match='pass its encoder, model.encoder'):
        extract_features(Model(), cells(3), 8, num_workers=0)
