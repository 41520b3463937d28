"A frozen encoder stays as it was, bit for bit, whatever mode it comes in; broken files are left out, NaN is refused."
import math, os, random, resource, shutil
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from simclr_nb.data.sources import load_images
from simclr_nb.data.files import BadImage
from simclr_nb.data.sets import ImageSet
from simclr_nb.features.copies import find_near_duplicates
from simclr_nb.features.extract import extract_features
from simclr_nb.features.metrics import accuracy
from simclr_nb.features.neighbors import NeighborClassifier, nearest
from simclr_nb.features.spectrum import effective_rank


def knn_predict(bank, labels, queries, k, temperature=.1):
    return torch.from_numpy(NeighborClassifier(k, temperature).fit(bank, labels).predict(queries))


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


# Features that are not finite

class Spoiled(nn.Module):
    "Pixels, of which those of one image in four are NaN."
    def forward(self, x):
        h = x.flatten(1).clone()
        h[3::4] = torch.nan
        return h


def test_an_encoder_that_returns_nan_is_refused_and_an_image_named(tmp_path):
    images = cells(10)
    name = images.files[3].name
    with pytest.raises(ValueError, match=f'the features of 2 of 10 images are not finite.*{name}'):
        extract_features(Spoiled(), images, 8, num_workers=0)
    with pytest.raises(ValueError, match='not finite'):
        extract_features(Spoiled(), images, 8, num_workers=0, out=tmp_path/'features')


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused_at_every_door(bad):
    h = torch.rand(20, 4)
    wrong = h.clone()
    wrong[5, 2] = bad
    y = torch.arange(20) % 2
    for call in (lambda: knn_predict(wrong, y, h, 3), lambda: knn_predict(h, y, wrong, 3), lambda: nearest(wrong, h, 3),
                 lambda: effective_rank(wrong)):
        with pytest.raises(ValueError, match='1 of 20 rows of .* not finite .*, the first is row 5'): call()


# Votes

@pytest.mark.parametrize('temperature', [.1, .005, 1e-4, 1e-30])
def test_votes_do_not_vanish_at_a_small_temperature(temperature):
    "The queries are no neighbors of class 0, which an underflow of all votes would answer."
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(200, 16, generator=g), torch.randn(100, 16, generator=g)
    labels = 1 + torch.arange(200) % 3
    sims = nn.functional.normalize(queries).double() @ nn.functional.normalize(bank).double().T
    top, at = sims.topk(20)
    weights = ((top - top[:, :1])/temperature).exp()
    exact = torch.zeros(100, 4, dtype=torch.float64).scatter_add_(1, labels[at], weights).argmax(1)
    assert (knn_predict(bank, labels, queries, 20, temperature) == exact).float().mean() >= .99


def test_votes_of_other_types_and_labels():
    bank, queries, labels = torch.tensor([[3, 0], [0, 2], [1, 1]]), torch.tensor([[9, 1], [1, 9]]), [5, 7, 6]
    for a in (bank, bank.float(), bank.double(), bank.half(), bank.tolist(), bank.numpy()):
        for b in (queries, queries.float(), queries.double()): assert knn_predict(a, labels, b, 1).tolist() == [5, 7]
    for wrong, words in (([5., 7., 6.], 'must be integers'), ([5, -1, 6], 'got -1 to 6'),
                         ([5, 7], 'one for each of 3')):
        with pytest.raises(ValueError, match=words): knn_predict(bank, wrong, queries, 1)
    for temperature in (0, -.1, math.nan):
        with pytest.raises(ValueError, match='temperature must be'): knn_predict(bank, labels, queries, 1, temperature)


def test_a_metric_takes_one_prediction_for_each_label():
    with pytest.raises(ValueError, match='a prediction for each label'): accuracy([0, 1, 1], [[0], [1], [1]])


# Numbers out of range

@pytest.mark.parametrize('crop', [0, 1e-9, -1, 2, math.nan, None])
def test_a_crop_out_of_range_is_named(crop):
    with pytest.raises(ValueError, match='crop must be a number, 0.01 or more and at most 1, got'):
        extract_features(nn.Flatten(), cells(2), 8, crop=crop, num_workers=0)


# Names that are not UTF-8

def latin(folder, image, name=b'caf\xe9.png'):
    "A file whose name is not UTF-8."
    file = Path(os.fsdecode(os.fsencode(folder/'x')[:-1] + name))
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file.with_name('x.png'))
    return file.with_name('x.png').rename(file)


def test_names_that_are_not_utf8(tmp_path):
    try: file = latin(tmp_path/'latin', cells(1)[0])
    except OSError: pytest.skip('this disk takes names in UTF-8 only')
    images = ImageSet([file])
    assert find_near_duplicates(cells(3), images) == [(cells(1).files[0], file, 'picture')]
    h, _ = extract_features(nn.Flatten(), images, 8, num_workers=0, out=tmp_path/'features')
    assert h.shape == (1, 192)
    with pytest.raises(ValueError, match=r'caf\\udce9\.png') as e:
        extract_features(nn.Sequential(nn.Flatten(), nn.Threshold(2, math.nan)), images, 8, num_workers=0)
    str(e.value).encode()


def test_a_file_that_vanished_is_no_duplicate(tmp_path):
    assert find_near_duplicates(cells(2), ImageSet([tmp_path/'gone.png'])) == []


# A folder of features

def stored(images, out, **kwargs): return extract_features(nn.Flatten(), images, 8, num_workers=0, out=out, **kwargs)[0]


@pytest.mark.parametrize('name', ['features.npy', 'indices.npy', 'progress.json'])
def test_a_folder_of_features_that_was_cut_short_is_refused(tmp_path, name):
    "Numpy fills up a file that is too short with zeros."
    images = cells(8)
    stored(images, tmp_path, batch_size=4)
    data = (tmp_path/name).read_bytes()
    (tmp_path/name).write_bytes(data[:len(data)//2])
    with pytest.raises(ValueError, match=f'{name} is damaged or cut short: remove the folder'): stored(images, tmp_path)


@pytest.mark.parametrize('text', ['[]', '{}', '{"rows": 1, "next": 0, "facts": {}}',
                                  '{"rows": "a", "next": 3, "facts": {}}'])
def test_a_damaged_note_of_progress_is_named(tmp_path, text):
    (tmp_path/'progress.json').write_text(text)
    with pytest.raises(ValueError, match='progress.json is damaged'): stored(cells(2), tmp_path)


def test_a_full_disk_is_told_before_the_first_features(tmp_path):
    "A process that writes to a map of a file that has no room dies of a bus error."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(OSError, match='no room for .* GB of features.*features.npy'): stored(cells(8), tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [] and stored(cells(8), tmp_path).shape == (8, 192)


class Shrink:
    "A transform with a setting."
    def __init__(self, side): self.side = side
    def __call__(self, image): return thumbnail(image.crop((0, 0, self.side, self.side)))


def test_transforms_with_other_settings_are_not_confused(tmp_path):
    images = cells(4)
    first = stored(images, tmp_path, transform=Shrink(100))
    torch.testing.assert_close(stored(images, tmp_path, transform=Shrink(100)), first, rtol=0, atol=0)
    with pytest.raises(ValueError, match='not the same transform'): stored(images, tmp_path, transform=Shrink(50))


def test_a_folder_of_images_may_move_and_not_change(tmp_path):
    def images(folder): return ImageSet(sorted((tmp_path/folder).rglob('*.png')))
    for f in cells(4).files:
        (tmp_path/'a').mkdir(exist_ok=True)
        shutil.copy(f, tmp_path/'a'/f.name)
    h = stored(images('a'), tmp_path/'features')
    (tmp_path/'a').rename(tmp_path/'b')
    torch.testing.assert_close(stored(images('b'), tmp_path/'features'), h, rtol=0, atol=0)
    file = images('b').files[0]
    data = bytearray(file.read_bytes())
    data[len(data)//2] ^= 1                                        # another picture of the same size
    file.write_bytes(data)
    with pytest.raises(ValueError, match='not the same files'): stored(images('b'), tmp_path/'features')
