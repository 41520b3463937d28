"Easy pictures for tests: noisy squares, a hue for each class."
import numpy as np
from PIL import Image

from simclr_nb.data.sets import folder_images

HUES = {'blue': (0, 0, 255), 'green': (0, 255, 0), 'red': (255, 0, 0)}


def pictures(folder, n, ending='jpg'):
    "n noisy squares of each hue, in a folder for each."
    rng = np.random.default_rng(0)
    for name, hue in HUES.items():
        (folder/name).mkdir(parents=True)
        for i in range(n):
            x = (.6*np.array(hue) + rng.normal(40, 40, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(x).save(folder/name/f'{i}.{ending}')
    return folder_images(folder)
