"Images kept in memory: crops are the same with them and without, bit for bit, whoever read them and when."
import os

import numpy as np, pytest, torch
from PIL import Image

from simclr_nb.augmentations import simclr_augmentations
from simclr_nb.data.datasets import TwoCropDataset, train_loader
from simclr_nb.data.files import BadImage
from simclr_nb.data.sets import ImageSet

augment = simclr_augmentations(24)


def made(folder, n=12, sides=((40, 60), (70, 70), (64, 64))):
    "Images of several sizes, kinds and orientations."
    files = []
    for i in range(n):
        w, h = sides[i % len(sides)]
        ending, mode, exif = ('png', 'jpg', 'tif')[i % 3], ('RGB', 'L')[i % 2], Image.Exif()
        exif[0x112] = 6 if i % 4 == 0 else 1
        coarse = np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        file = folder/f'{i:02}.{ending}'
        Image.fromarray(coarse).resize((w, h), Image.BICUBIC).convert(mode).save(file, exif=exif)
        files.append(file)
    return files

def items(dataset, epochs=(0, 1, 2)): return [dataset[epoch, i] for epoch in epochs for i in range(len(dataset))]

def same(a, b):
    return torch.equal(a[0], b[0]) and a[0].stride() == b[0].stride() and (a[1] == b[1]).all() and a[2:] == b[2:]

def without_files(dataset):
    "Whether each image is still there once its file is gone."
    held = []
    for i, file in enumerate(dataset.images.files):
        file.rename(f'{file}.away')
        try: held.append(len(dataset.views(9, i)) == 2)
        except BadImage: held.append(False)
        os.rename(f'{file}.away', file)
    return held


def test_crops_are_the_same_with_a_cache(tmp_path):
    images = ImageSet(made(tmp_path))
    kept, plain = TwoCropDataset(images, augment, cache_mb=1), TwoCropDataset(images, augment)
    assert all(same(a, b) for a, b in zip(items(kept), items(plain), strict=True))
    assert all(without_files(kept)) and not any(without_files(plain))

def test_a_jpeg_that_may_be_decoded_at_reduced_size_is_not_kept(tmp_path):
    "Its crops would be others."
    images = ImageSet([*made(tmp_path, 3), tmp_path/'large.jpg', tmp_path/'large.png'])
    for file in images.files[3:]: Image.open(images.files[0]).resize((90, 72), Image.BICUBIC).save(file)
    kept, plain = TwoCropDataset(images, augment, cache_mb=1), TwoCropDataset(images, augment)
    assert all(same(a, b) for a, b in zip(items(kept, range(20)), items(plain, range(20)), strict=True))
    assert without_files(kept) == [True]*3 + [False, True]

def test_what_does_not_fit_is_read_anew(tmp_path):
    images = ImageSet(made(tmp_path, sides=((40, 60), (70, 70))))
    room = 12*3*40*60/2**20
    kept, plain = TwoCropDataset(images, augment, cache_mb=room), TwoCropDataset(images, augment)
    assert all(same(a, b) for a, b in zip(items(kept), items(plain), strict=True))
    assert without_files(kept) == [True, False]*6
    assert kept.cache.pixels.nbytes <= room*2**20

def test_no_more_memory_is_taken_than_the_images_need(tmp_path):
    kept = TwoCropDataset(ImageSet(made(tmp_path)), augment, cache_mb=1000)
    assert kept.cache.pixels.nbytes == 12*3*70*70

def test_a_cache_too_small_for_any_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='12 images .* 7200 and more: choose 1 MB'):
        TwoCropDataset(ImageSet(made(tmp_path)), augment, cache_mb=.01)

def test_unreadable_files_are_still_left_out(tmp_path):
    files = made(tmp_path)
    (tmp_path/'broken.png').write_text('no picture')
    images = ImageSet([tmp_path/'broken.png', *files])
    kept, plain = TwoCropDataset(images, augment, cache_mb=1), TwoCropDataset(images, augment)
    assert all(same(a, b) for a, b in zip(items(kept), items(plain), strict=True))
    assert kept.unreadable_files() == [tmp_path/'broken.png']

def batches(images, epochs=2, **kwargs):
    loader = train_loader(images, augment, 4, **kwargs)
    return loader, [batch for _ in range(epochs) for batch in loader]

@pytest.mark.parametrize('method', ['fork', 'forkserver'])
def test_workers_fill_one_cache(tmp_path, method):
    "After one epoch it holds what any worker has read."
    images = ImageSet(made(tmp_path))
    if method not in torch.multiprocessing.get_all_start_methods(): pytest.skip(f'no {method} here')
    before = torch.multiprocessing.get_start_method(allow_none=True)
    torch.multiprocessing.set_start_method(method, force=True)
    try: loader, got = batches(images, num_workers=2, cache_mb=1)
    finally: torch.multiprocessing.set_start_method(before, force=True)
    assert all(without_files(loader.dataset))
    for a, b in zip(got, batches(images, num_workers=0)[1], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_learner_takes_the_same_steps_with_a_cache(tmp_path):
    from simclr_nb.learner import simclr_learner
    losses, images = [], ImageSet(made(tmp_path))
    for cache in (0, 1):
        learn = simclr_learner(images, 'resnet18_0.125x', augment=augment, num_workers=0, cache_mb=cache)
        with learn.no_bar(), learn.no_logging(): learn.pretrain(2, 4, lr=.1)
        losses.append([float(loss) for loss in learn.recorder.losses])
        kept = learn.dls.train.dataset.cache
        assert (kept is not None and bool((kept.sizes[:, 0] > 0).any())) == bool(cache)
    assert len(losses[0]) == 6 and losses[0] == losses[1]
