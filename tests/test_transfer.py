"Every layout of a data set in the transfer table, and what its linear protocol may look at."
import json, pickle, shutil
from hashlib import md5

import numpy as np, pytest, torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from simclr_nb.data.sets import ImageSet
from simclr_nb.evaluation import transfer as module
from simclr_nb.evaluation.classifier import ClassifierSettings
from simclr_nb.evaluation.transfer import transfer_linear, transfer_table
from simclr_nb.evaluation.transfer_sets import find_transfer, transfer_sets, transfer_splits

HUES = {'blue': (0, 0, 255), 'green': (0, 255, 0), 'red': (255, 0, 0)}
RNG = np.random.default_rng(0)


def pixels(hue): return (.6*np.array(HUES[hue]) + RNG.normal(40, 40, (32, 32, 3))).clip(0, 255).astype(np.uint8)


def picture(path, hue):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(hue)).save(path)


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')


def rows(n): return [(h, i) for h in HUES for i in range(n)]


def food(root):
    base = root/'food-101'
    for part, n in dict(train=6, test=4).items():
        names = {h: [f'{h}/{part}{i}' for i in range(n)] for h in HUES}
        write(base/f'meta/{part}.json', [json.dumps(names)])
        for h, i in rows(n): picture(base/f'images/{h}/{part}{i}.jpg', h)


def cars(root):
    base = root/'stanford_cars'
    (base/'devkit').mkdir(parents=True)
    savemat(base/'devkit/cars_meta.mat', {'class_names': np.array(list(HUES), dtype=object)})
    parts = ('cars_train', 'devkit/cars_train_annos.mat', 6), ('cars_test', 'cars_test_annos_withlabels.mat', 4)
    for folder, file, n in parts:
        noted = [(f'{h}{i}.jpg', k + 1) for k, h in enumerate(HUES) for i in range(n)]
        savemat(base/file, {'annotations': np.array(noted, dtype=[('fname', object), ('class', object)])})
        for h, i in rows(n): picture(base/folder/f'{h}{i}.jpg', h)


def aircraft(root):
    base = root/'fgvc-aircraft-2013b/data'
    write(base/'variants.txt', HUES)
    for part, n in dict(train=6, val=4, test=4).items():
        write(base/f'images_variant_{part}.txt', [f'{part}{h}{i} {h}' for h, i in rows(n)])
        for h, i in rows(n): picture(base/f'images/{part}{h}{i}.jpg', h)


def sun(root):
    base = root/'SUN397'
    write(base/'ClassName.txt', [f'/{h[0]}/{h}' for h in HUES])
    for h, i in rows(10): picture(base/f'{h[0]}/{h}/sun_{i}.jpg', h)
    write(base/'Training_01.txt', [f'/{h[0]}/{h}/sun_{i}.jpg' for h, i in rows(6)])
    write(base/'Testing_01.txt', [f'/{h[0]}/{h}/sun_{i}.jpg' for h, i in rows(10) if i >= 6])


def caltech(root):
    for h, i in rows(34): picture(root/f'caltech101/101_ObjectCategories/{h}/image_{i + 1:04}.jpg', h)
    picture(root/'caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg', 'red')


def digest(path): return md5(path.read_bytes()).hexdigest()


def flowers(root, monkeypatch):
    base, parts = root/'flowers-102', dict(trnid=range(1, 19), valid=range(19, 31), tstid=range(31, 43))
    for i in range(1, 43): picture(base/f'jpg/image_{i:05}.jpg', list(HUES)[i % 3])
    savemat(base/'imagelabels.mat', {'labels': [i % 3 + 1 for i in range(1, 43)]})
    savemat(base/'setid.mat', {k: list(v) for k, v in parts.items()})
    monkeypatch.setattr(datasets.Flowers102, '_check_integrity', lambda self: True)


def cifar(root, monkeypatch, cls, label):
    "What the pickles of CIFAR hold, with check sums of their own."
    base = root/cls.base_folder
    base.mkdir(parents=True)
    for (name, _), n in ((cls.train_list[0], 6), (cls.test_list[0], 4)):
        data = np.stack([pixels(h).transpose(2, 0, 1).ravel() for h, _ in rows(n)])
        (base/name).write_bytes(pickle.dumps({'data': data, label: [k for k in range(3) for _ in range(n)]}))
    (base/cls.meta['filename']).write_bytes(pickle.dumps({cls.meta['key']: list(HUES)}))
    for part in ('train_list', 'test_list'):
        name = getattr(cls, part)[0][0]
        monkeypatch.setattr(cls, part, [[name, digest(base/name)]])
    monkeypatch.setattr(cls, 'meta', cls.meta | {'md5': digest(base/cls.meta['filename'])})


@pytest.fixture
def every_set(tmp_path, monkeypatch):
    for make in (food, cars, aircraft, sun, caltech): make(tmp_path)
    flowers(tmp_path, monkeypatch)
    cifar(tmp_path, monkeypatch, datasets.CIFAR10, 'labels')
    cifar(tmp_path, monkeypatch, datasets.CIFAR100, 'fine_labels')
    return tmp_path


def hue_of(image):
    "What a person would say."
    return int(np.asarray(image, dtype=float).mean((0, 1))[::-1].argmax())


@pytest.mark.filterwarnings('ignore:left out')
def test_every_layout_gives_its_files_and_labels(every_set):
    found, left_out = find_transfer(every_set)
    assert set(left_out) == {'Birdsnap', 'VOC2007', 'DTD', 'Pets'} and all(left_out.values())
    sizes = {n: tuple(len(p[k]) if p[k] else 0 for k in ('train', 'val', 'test')) for n, p in found.items()}
    expected = {n: (18, 12, 12) if transfer_sets[n].val else (18, 0, 12) for n in found}
    assert sizes == expected | {'Caltech-101': (90, 0, 12)}
    for name, splits in found.items():
        for s in filter(None, splits.values()):
            assert len(s.classes) == (102 if name == 'Flowers' else 3) and all(f.is_file() for f in s.files), name
            if name == 'Flowers': assert [list(HUES)[y] for y in s.labels] == [list(HUES)[hue_of(im)] for im in s]
            else: assert [y == hue_of(s[i]) for i, y in enumerate(s.labels)] == [True]*len(s), name
        assert not {f.resolve() for f in splits['train'].files} & {f.resolve() for f in splits['test'].files}, name


def test_cifar_is_written_once_and_losslessly(every_set):
    first = transfer_splits('CIFAR10', every_set)
    times = [f.stat().st_mtime_ns for f in first['train'].files]
    again = transfer_splits('CIFAR10', every_set)
    assert [f.stat().st_mtime_ns for f in again['train'].files] == times
    data = datasets.CIFAR10(every_set, train=True).data
    assert all(np.array_equal(np.asarray(again['train'][i]), x) for i, x in enumerate(data))


def test_missing_partition_lists_are_named(tmp_path):
    sun(tmp_path)
    (tmp_path/'SUN397/Training_01.txt').unlink()
    with pytest.warns(UserWarning, match='left out 1 of 1 sets.*SUN397'):
        found, left_out = find_transfer(tmp_path, ['SUN397'])
    assert not found and 'official partitions' in left_out['SUN397']


def test_a_damaged_set_is_not_passed_over(tmp_path):
    "Missing is one thing, damaged another."
    aircraft(tmp_path)
    write(tmp_path/'fgvc-aircraft-2013b/data/images_variant_train.txt', ['a.jpg yellow'])
    with pytest.raises(KeyError): find_transfer(tmp_path, ['Aircraft'])


here = ClassifierSettings(fraction=.2, num_workers=0)

def tone(): return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def test_linear_transfer_chooses_on_validation_images_only(every_set):
    "Wrong labels in the test set change the score and nothing else."
    splits = transfer_splits('Aircraft', every_set)
    kw = dict(metric='balanced_accuracy', size=32, s=here, l2=np.logspace(-4, 2, 5))
    right = transfer_linear(tone(), splits, **kw)
    assert right['balanced_accuracy'] == 100 and len(right['tried']) == 5
    t = splits['test']
    wrong = transfer_linear(tone(), splits | dict(test=ImageSet(t.files, (t.labels + 1) % 3, t.classes)), **kw)
    assert wrong['tried'] == right['tried'] and wrong['chosen'] == right['chosen'] and wrong['balanced_accuracy'] == 0
    np.testing.assert_array_equal(wrong['logits'], right['logits'])


def test_linear_transfer_trains_on_both_parts_in_the_end(every_set):
    "The seam `fit`: what it is given, and that its answers are what is scored."
    asked = []
    def fit(h, y, l2):
        asked.append((len(h), [float(v) for v in l2]))
        centers = torch.stack([h[y == c].mean(0) for c in range(3)])
        return lambda x: [-torch.cdist(x, centers) for _ in l2]
    splits = transfer_splits('Flowers', every_set)
    out = transfer_linear(tone(), splits, 'balanced_accuracy', 32, here, [1., 2.], fit)
    assert asked == [(18, [1., 2.]), (30, [out['chosen']])] and out['balanced_accuracy'] == 100


# Sets that cannot be evaluated

def birds(root, train=HUES, test=HUES):
    for part, hues, n in (('train', train, 6), ('test', test, 4)):
        for h in hues:
            for i in range(n): picture(root/f'Birdsnap/{part}/{h}/{i}.png', h)


def quick(root, **kwargs):
    return transfer_table({'a': tone()}, root, 32, here, protocols=['linear'], l2=[.01, 1.], **kwargs)


def test_a_set_of_one_class_is_named_and_stops_no_other(tmp_path):
    birds(tmp_path, ['red'], ['red'])
    aircraft(tmp_path)
    with pytest.warns(UserWarning, match='left out 1 of 2 sets.*Birdsnap .*of one class, red'):
        table = quick(tmp_path, names=['Birdsnap', 'Aircraft'])
    assert list(table['left_out']) == ['Birdsnap'] and list(table['linear']) == ['Aircraft']


def test_a_set_whose_test_classes_do_not_train_is_left_out(tmp_path):
    aircraft(tmp_path)
    lists = tmp_path/'fgvc-aircraft-2013b/data'
    for part, n in dict(train=6, val=4).items():
        write(lists/f'images_variant_{part}.txt', [f'{part}{h}{i} {h}' for h, i in rows(n) if h != 'green'])
    with pytest.warns(UserWarning, match='no training image of these classes of the test images: green'):
        assert find_transfer(tmp_path, ['Aircraft'])[0] == {}


def test_an_error_names_the_set_the_protocol_and_the_encoder(tmp_path):
    birds(tmp_path)
    class Nan(torch.nn.Module):
        def forward(self, x): return x.flatten(1)*torch.nan
    with pytest.raises(ValueError, match='Birdsnap, linear, broken: the features of 14 of 14 images are not finite'):
        transfer_table({'broken': Nan()}, tmp_path, 32, here, ['Birdsnap'])
    with pytest.raises(ValueError, match='Birdsnap, finetuned, a: lr must be a number, above 0, got 0'):
        transfer_table({'a': tone()}, tmp_path, 32, here, ['Birdsnap'], ['finetuned'], {'a': dict(lr=0)})
    with pytest.raises(ValueError, match="the protocols are 'linear' and 'finetuned', got"):
        transfer_table({'a': tone()}, tmp_path, 32, here, ['Birdsnap'], ['linaer'])


# Answers that are kept

@pytest.fixture
def kept(tmp_path):
    birds(tmp_path/'sets')
    def run(root='sets'):
        quick(tmp_path/root, names=['Birdsnap'], keep=tmp_path/'kept')
        return {f: f.stat().st_mtime_ns for f in (tmp_path/'kept').iterdir()}
    return run, tmp_path


def test_answers_are_kept_where_the_sets_move(kept):
    run, folder = kept
    first = run()
    (folder/'sets').rename(folder/'elsewhere')
    assert run('elsewhere') == first and len(first) == 1


def test_another_version_and_other_images_are_asked_anew(kept, monkeypatch):
    run, folder = kept
    first = run()
    monkeypatch.setattr(module, '__version__', '0.0.0')
    assert len(run()) == 2
    monkeypatch.undo()
    assert run().keys() > first.keys() and len(run()) == 2
    classes = folder/'sets/Birdsnap/train'
    (classes/'red/0.png').rename(classes/'green/9.png')                # the same images, one with another label
    assert len(run()) == 3


def test_a_damaged_answer_is_computed_again(kept):
    run, _ = kept
    file, = run()
    good = file.read_bytes()
    for data in (good[:len(good)//2], b'', b'no zip file'):
        file.write_bytes(data)
        with pytest.warns(UserWarning, match=f'{file.name} is damaged'): run()
        with np.load(file) as stored: assert 'logits' in stored


def test_a_disk_that_fills_up_leaves_no_half_of_cifar(every_set, monkeypatch):
    shutil.rmtree(every_set/'CIFAR10_png', ignore_errors=True)
    def full(self, path): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', full)
        with pytest.raises(OSError, match='No space left'): transfer_splits('CIFAR10', every_set)
    assert list((every_set/'CIFAR10_png').iterdir()) == []
    assert len(transfer_splits('CIFAR10', every_set)['train']) == 18
