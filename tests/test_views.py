"What an image's views are depends on seed, epoch and image alone: not on workers, batches, or an interruption."
import re
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from simclr_nb.augmentations import Stream, crop_views, keyed_rng, simclr_augmentations
from simclr_nb.data.datasets import train_loader
from simclr_nb.data.sets import folder_images
from simclr_nb.operations import broader_augmentations
from simclr_nb.training.views import apply_cpu

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


def views_of(images, augment, epoch=0, batch_size=8, num_workers=0, backwards=False, skip=0):
    "All views of an epoch, by image, through loader and augmentation; the first `skip` images are left out."
    loader, got = train_loader(images, augment, batch_size, SEED, num_workers), {}
    sampler = loader.batch_sampler
    sampler.step = sampler.steps(epoch) + skip//batch_size
    last = IMAGES//batch_size - 1
    if backwards: sampler.batch = lambda step: type(sampler).batch(sampler, last - step)[::-1]
    for crops, params, idxs in loader:
        views = augment.views(crops, params, apply_cpu)
        got |= {int(i): views[[k, k + len(idxs)]] for k, i in enumerate(idxs)}
    return got


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[i], b[i]) for i in a)


recipes = dict(paper=simclr_augmentations(40), broader=broader_augmentations(40, p=.5))


@pytest.fixture(scope='module', params=recipes.values(), ids=recipes)
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
    assert equal(views_of(images, augment, backwards=True), epoch0)
    assert equal(views_of(images, augment, batch_size=16, num_workers=2), epoch0)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_run_resumed_within_an_epoch_goes_on_with_the_same_views(images, augment, epoch0, num_workers):
    rest = views_of(images, augment, num_workers=num_workers, skip=16)
    order = list(epoch0)                                # the order of the uninterrupted run
    assert list(rest) == order[16:] if num_workers == 0 else sorted(rest) == sorted(order[16:])
    assert all(torch.equal(rest[i], epoch0[i]) for i in rest)


def test_views_cropped_on_the_device_depend_on_the_key_alone(augment):
    x = torch.rand(6, 3, 50, 60, generator=torch.Generator().manual_seed(0))
    whole = crop_views(augment, x, SEED, epoch=2)
    part = crop_views(augment, x[4:], SEED, epoch=2, first=4)
    assert torch.equal(part, whole[[4, 5, 10, 11]])


def test_each_draw_is_that_of_its_key(images):
    augment = simclr_augmentations(40)
    boxes, params = augment.draw_views((SEED, 0, 7), 200, 150)
    for _ in range(3): augment.draw_views((SEED, 0, 8), 200, 150)
    again = augment.draw_views((SEED, 0, 7), 200, 150)
    assert boxes == again[0] and all((a == b).all() for a, b in zip(params, again[1]))


package = Path(__file__).resolve().parents[1]/'simclr_nb'

def streams_by_hand(sources):
    "Lines of sources, by name, where a stream of random numbers has no name."
    hand = re.compile(r'2\s*\*\*\s*32|1\s*<<\s*32|4_?294_?967_?\d+|view\s*=\s*(?!Stream\.|0\b|1\b|view\b)[\w(]')
    return [f'{name}: {line.strip()}' for name, source in sources.items() for line in source.splitlines()
            if hand.search(line.partition('#')[0]) and 'keyed_rng' in source and not line.startswith('beyond = ')]

def test_every_stream_of_random_numbers_has_a_name_and_a_number_of_its_own():
    sources = {f.relative_to(package).as_posix(): f.read_text(encoding='utf-8') for f in package.rglob('*.py')}
    assert streams_by_hand(sources) == []
    used = set(re.findall(r'Stream\.([A-Z_]+)', '\n'.join(sources.values())))
    assert used == set(Stream.__members__)                           # none that nobody draws from, no alias
    assert len({int(stream) for stream in Stream}) == len(Stream.__members__)
    assert len({keyed_rng(SEED, 1, 2, view).random() for view in (0, 1, 2, 3, *Stream)}) == 4 + len(Stream)

@pytest.mark.parametrize('line', ['keyed_rng(seed, view=2**32 + 9)', 'keyed_rng(seed, view=offset + 5)',
                                  'view = 4294967301; keyed_rng(0, view=view)'])
def test_a_stream_without_a_name_is_found(line): assert streams_by_hand({'other.py': line})

def test_the_streams_that_views_depend_on_keep_their_numbers():
    "Runs of version 0.1 go on with the order, the replacements and the views that they began with."
    kept = dict(ORDER=0, SHARED_BOX=1, NOISE=2, LABELS=3, REPLACEMENT=4, PARTNER=5, SAMPLE=6)
    assert {name: Stream[name] - 2**32 for name in kept} == kept
