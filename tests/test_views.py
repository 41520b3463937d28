"What an image's views are depends on seed, epoch and image alone: not on workers, batches, or an interruption."
import numpy as np, pytest, torch
from PIL import Image
from simclr_nb.augmentations import crop_resize, crop_views, make_views, simclr_augmentations
from simclr_nb.core import pixels
from simclr_nb.data import folder_images, pair_loaders
from simclr_nb.operations import apply_cpu, broader_augmentations

IMAGES, SEED = 32, 3


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "JPEGs of several sizes, one of them on its side, and some of them large enough to be decoded at reduced size."
    folder = tmp_path_factory.mktemp('images')
    for i in range(IMAGES):
        rng = np.random.default_rng(i)
        small = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
        exif = Image.Exif()
        if i == 5: exif[0x112] = 6
        small.resize((60 + 9*i, 45 + 8*i), Image.BICUBIC).save(folder/f'{i:02}.jpg', exif=exif, quality=90)
    return folder_images(folder)


def views_of(images, augment, epoch=0, bs=8, num_workers=0, order=None, skip=0):
    "All views of an epoch, by image, through loader and augmentation."
    dls = pair_loaders(images, augment, bs, SEED, num_workers, device='cpu')
    dls.train.start, dls.train.done = epoch, skip//bs
    if order: dls.train.get_idxs = order(dls.train.get_idxs)
    got = {}
    for crops, params, idxs in dls.train:
        views = make_views(augment, crops, params, apply=apply_cpu)
        got |= {int(i): views[[k, k + len(idxs)]] for k, i in enumerate(idxs)}
    return got


def backwards(idxs): return lambda: idxs()[::-1]
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[i], b[i]) for i in a)


RECIPES = dict(paper=simclr_augmentations(40), broader=broader_augmentations(40, p=.5))


@pytest.fixture(scope='module', params=RECIPES.values(), ids=RECIPES)
def augment(request): return request.param


@pytest.fixture(scope='module')
def epoch0(images, augment): return views_of(images, augment)


def test_every_image_is_there_and_epochs_differ(images, augment, epoch0):
    assert sorted(epoch0) == list(range(IMAGES))
    epoch1 = views_of(images, augment, epoch=1)
    assert not any(torch.equal(epoch0[i], epoch1[i]) for i in epoch0)
    assert not any(torch.equal(*v) for v in epoch0.values()), 'the two views of an image are drawn apart'


@pytest.mark.parametrize('num_workers', [2, 4])
def test_workers_change_nothing(images, augment, epoch0, num_workers):
    assert equal(views_of(images, augment, num_workers=num_workers), epoch0)


def test_other_orders_and_batches_change_nothing(images, augment, epoch0):
    assert equal(views_of(images, augment, order=backwards), epoch0)
    assert equal(views_of(images, augment, bs=16, num_workers=2), epoch0)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_run_resumed_within_an_epoch_goes_on_with_the_same_views(images, augment, epoch0, num_workers):
    rest = views_of(images, augment, num_workers=num_workers, skip=16)
    order = list(epoch0)                                # the order of the uninterrupted run
    assert list(rest) == order[16:] if num_workers == 0 else sorted(rest) == sorted(order[16:])
    assert all(torch.equal(rest[i], epoch0[i]) for i in rest)


def test_views_cropped_on_the_device_depend_on_the_key_alone(augment):
    x = torch.rand(6, 3, 50, 60, generator=torch.Generator().manual_seed(0))
    whole = crop_views(augment, x, SEED, epoch=2, apply=apply_cpu)
    part = crop_views(augment, x[4:], SEED, epoch=2, first=4, apply=apply_cpu)
    assert torch.equal(part, whole[[4, 5, 10, 11]])
    reference = crop_views(augment, x[4:], SEED, epoch=2, first=4)
    torch.testing.assert_close(reference, crop_views(augment, x, SEED, epoch=2)[[4, 5, 10, 11]], rtol=0, atol=1e-5)


def test_each_draw_is_that_of_its_key():
    augment = simclr_augmentations(40)
    boxes, params = augment.draw_views((SEED, 0, 7), 200, 150)
    for _ in range(3): augment.draw_views((SEED, 0, 8), 200, 150)
    again = augment.draw_views((SEED, 0, 7), 200, 150)
    assert boxes == again[0] and (params == again[1]).all()


def test_one_image_with_a_key_gets_the_views_of_a_batch(images, augment):
    "The same boxes, parameters and pixels as make_views gives, for an image that the loader decodes whole."
    keys = [(SEED, 0, i) for i in (0, 3, 5)]
    draws = [augment.draw_views(key, *images[key[-1]].size) for key in keys]
    crops = torch.stack([torch.stack([crop_resize(pixels(images[key[-1]]), box, augment.size) for box in boxes])
                         for key, (boxes, _) in zip(keys, draws)])
    views = make_views(augment, crops, torch.from_numpy(np.stack([params for _, params in draws])), apply=apply_cpu)
    for k, key in enumerate(keys):
        first, second = augment(images[key[-1]], key=key, apply=apply_cpu)
        assert torch.equal(first, views[k]) and torch.equal(second, views[k + len(keys)])


class Whole(torch.utils.data.Dataset):
    "A data set of someone else's, with an augmentation as its transform."
    def __init__(self, images, transform): self.images, self.transform = images, transform
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.transform(self.images[i])


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_data_loader_of_torch_repeats_with_its_seed(images, num_workers):
    data = Whole(images, simclr_augmentations(40))
    loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=num_workers)
    def run(seed):
        torch.manual_seed(seed)
        return torch.cat([torch.cat(views) for views in loader])
    first = run(0)
    assert first.shape == (2*IMAGES, 3, 40, 40)
    assert torch.equal(run(0), first) and not torch.equal(run(1), first)
    assert len(first.flatten(1).unique(dim=0)) == 2*IMAGES


def test_a_camera_image_on_its_side_is_turned_upright(images):
    "As the loader does: image 5 is stored on its side."
    augment = simclr_augmentations(40)
    with Image.open(images.files[5]) as im:
        assert im.size != images[5].size
        views = augment(im, key=(SEED, 0, 5))
    for view, want in zip(views, augment(images[5], key=(SEED, 0, 5))): assert torch.equal(view, want)
