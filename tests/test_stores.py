"The same pictures give the same views from a folder, shards, tables, a bucket and memory, and runs resume on them."
import csv, io, os, pickle, tarfile
from dataclasses import replace

import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file

import forks

from simclr_nb.commands import main as cli
from simclr_nb.data import stores
from simclr_nb.augmentations import Augmentation, RandomResizedCrop, simclr_augmentations
from simclr_nb.training.history import HistoryCallback, read_history
from simclr_nb.data.datasets import TwoCropDataset, train_loader
from simclr_nb.data.sources import load_images
from simclr_nb.features.extract import extract_features
from simclr_nb.data.files import StoreError
from simclr_nb.data.sets import ImageSet, folder_images
from simclr_nb.data.tables import array_images, dataset_images

IMAGES = 40
augment = simclr_augmentations(32)


def picture(i):
    coarse = np.random.default_rng(i).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((50 + i % 7, 40), Image.BICUBIC)


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('cache'))
    yield
    del os.environ['XDG_CACHE_HOME']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "The same 40 pictures, PNG, JPEG, BMP and turned JPEG, in every store there is."
    root, pa = tmp_path_factory.mktemp('stores'), pytest.importorskip('pyarrow')
    import fsspec, pyarrow.parquet as parquet
    lying = Image.Exif()
    lying[0x112] = 6
    for i in range(IMAGES):
        ending, how = (('png', {}), ('jpg', {}), ('bmp', {}), ('jpg', dict(exif=lying)))[i % 4]
        file = root/'folder'/f'class {i % 2}'/f'{i:02}.{ending}'
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(file, **how)
    files = [*folder_images(root/'folder').files]
    names = [f.relative_to(root/'folder').as_posix() for f in files]
    (root/'shards').mkdir()
    for k in range(3):
        with tarfile.open(root/f'shards/{k}.tar', 'w') as tar:
            for name, file in [*zip(names, files)][k::3]: tar.add(file, name)
    with open(root/'list.csv', 'w', newline='') as f:
        rows = csv.writer(f)
        rows.writerow(['path', 'label', 'patient'])
        for i, name in enumerate(names): rows.writerow([f'folder/{name}', name.split('/')[0], f'p{i//4}'])
    held = [dict(bytes=f.read_bytes(), path=f.name) for f in files]
    labels, patients = [name.split('/')[0] for name in names], [f'p{i//4}' for i in range(IMAGES)]
    table = pa.table(dict(image=held, label=labels, patient=patients))
    parquet.write_table(table, root/'set.parquet', row_group_size=7)
    bucket = fsspec.filesystem('memory')
    for name, file in zip(names, files): bucket.pipe(f'/stores/{name}', file.read_bytes())
    return root


@pytest.fixture(scope='module')
def sources(place):
    return dict(shards=place/'shards', pattern=f'{place}/shards/*.tar', csv=place/'list.csv',
                parquet=place/'set.parquet', bucket='memory://stores')


@pytest.fixture(scope='module')
def folder(place): return folder_images(place/'folder')


def batches(images, num_workers=0, augment=augment):
    return [*train_loader(images, augment, 8, seed=5, num_workers=num_workers)]


def same(a, b):
    "Are two lists of batches equal, bit for bit?"
    return all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize('name', ['shards', 'pattern', 'csv', 'parquet', 'bucket'])
def test_a_store_gives_the_views_of_the_folder_bit_for_bit(folder, sources, name):
    images = load_images(sources[name])
    assert images.labels.tolist() == folder.labels.tolist() and images.classes == folder.classes
    want = batches(folder)
    assert same(batches(images), want) and same(batches(images, num_workers=2), want)
    assert not same(batches(images.subset(range(IMAGES)[::-1])), want)                 # the test can tell


def test_pictures_in_memory_give_the_same_views(folder):
    arrays = [np.asarray(folder[i]) for i in range(IMAGES)]
    files = folder.files
    lossless = [i for i in range(IMAGES) if files[i].suffix != '.jpg']                  # a JPEG may be decoded smaller
    memory = array_images([arrays[i] for i in lossless], folder.labels[lossless], folder.classes)
    assert same(batches(memory), batches(folder.subset(lossless)))
    several = dataset_images([(folder[i], int(folder.labels[i])) for i in lossless])
    assert same(batches(several), batches(memory))


def test_a_set_of_the_hugging_face_library(place, folder):
    datasets = pytest.importorskip('datasets')
    def rows():
        for f, y in zip(folder.files, folder.labels):
            yield dict(picture=dict(bytes=f.read_bytes(), path=None), kind=int(y))
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=folder.classes))
    data = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(place/'hub'))
    data.save_to_disk(str(place/'saved'))
    assert same(batches(ImageSet(load_images(place/'saved').files, folder.labels)), batches(folder))
    from simclr_nb.data.sources import hub_images
    images = hub_images(data)
    assert images.classes == folder.classes and same(batches(images), batches(folder))


@pytest.mark.parametrize('name', ['shards', 'parquet', 'bucket'])
def test_features_and_marks_do_not_need_files(folder, sources, name):
    images, net = load_images(sources[name]), torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    want, _ = extract_features(net, folder, 32, num_workers=0)
    got, _ = extract_features(net, images, 32, num_workers=0)
    assert torch.equal(want, got)
    from simclr_nb.training.resume import file_marks
    assert len(set(file_marks(images.files).tolist())) == IMAGES


def test_stores_go_to_spawned_workers(sources):
    for source in sources.values():
        images = pickle.loads(pickle.dumps(load_images(source)))
        assert images.files[7].read_bytes() == load_images(source).files[7].read_bytes()


def test_labels_beside_the_pictures(place, folder):
    with tarfile.open(place/'web.tar', 'w') as tar:
        for i in range(6):
            for ending, data in (('png', open(folder.files[0], 'rb').read()), ('cls', str(5 - i).encode())):
                member = tarfile.TarInfo(f'{i:04}.{ending}')
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    images = load_images(place/'web.tar')
    assert images.labels.tolist() == [5, 4, 3, 2, 1, 0] and len(images) == 6


def test_an_index_out_of_step_is_made_anew(place, folder):
    path = place/'moving.tar'
    for chosen in ([0, 1, 2], [5, 6]):
        with tarfile.open(path, 'w') as tar:
            for i in chosen: tar.add(folder.files[i], f'{i}{folder.files[i].suffix}')
        images = load_images(path)
        assert [f.read_bytes() for f in images.files] == [folder.files[i].read_bytes() for i in chosen]
    kept = max((stores.cache_folder()/'tar').glob('*.npz'), key=lambda f: f.stat().st_mtime)
    kept.write_bytes(kept.read_bytes()[:50])                                           # the index itself is damaged
    assert len(load_images(path)) == 2


@pytest.mark.parametrize('keep', [100, 511, 700, 10_000])
def test_a_shard_cut_off_is_named(place, keep):
    whole = (place/'shards/0.tar').read_bytes()
    (place/'cut.tar').write_bytes(whole[:keep])
    with pytest.raises(ValueError, match='cut.tar is no tar file|no pictures in'):
        load_images(place/'cut.tar')


def test_a_shard_that_shrinks_while_it_is_used_is_named(place, tmp_path):
    shard = tmp_path/'a.tar'
    shard.write_bytes((place/'shards'/'0.tar').read_bytes())
    images = load_images(shard)
    assert images.files[len(images) - 1].read_bytes()
    with open(shard, 'r+b') as f: f.truncate(1000)
    with pytest.raises(StoreError, match='a.tar is shorter than it was'): images.files[len(images) - 1].read_bytes()


def test_a_compressed_shard_is_named(place):
    with tarfile.open(place/'small.tar.gz', 'w:gz') as tar: tar.add(place/'list.csv', 'a.png')
    (place/'small.tar.gz').rename(place/'gz.tar')
    with pytest.raises(ValueError, match='compressed'): load_images(place/'gz.tar')


class Silent:
    "A read that stops answering after a while."
    def __init__(self, images, after): self.images, self.left = images, after
    def __call__(self, i):
        self.left -= 1
        if self.left < 0: raise TimeoutError('no answer')
        return self.images.files[i].read_bytes()


def test_a_store_that_stops_answering_ends_the_run_and_takes_no_other_picture(folder, monkeypatch):
    monkeypatch.setattr('simclr_nb.data.files.pauses', (.01,))
    silent = Silent(folder, 5)
    files = load_images('memory://stores').files
    monkeypatch.setattr(type(files), 'read', lambda self, i: stores.answer(lambda: silent(i), self.address(i)))
    dataset = TwoCropDataset(ImageSet(files), augment)
    for i in range(5): dataset[0, i]
    with pytest.raises(StoreError, match='does not answer, after 2 tries.*the same command goes on'): dataset[0, 5]
    assert not dataset.unreadable.any()


def test_a_picture_that_is_gone_is_left_out(folder):
    import fsspec
    files = load_images('memory://stores').files
    fsspec.filesystem('memory').pipe('/gone/a.png', folder.files[0].read_bytes())
    fsspec.filesystem('memory').pipe('/gone/b.png', folder.files[0].read_bytes())
    images = load_images('memory://gone')
    fsspec.filesystem('memory').rm('/gone/a.png')
    dataset = TwoCropDataset(images, augment)
    assert dataset[0, 0][-1] == 1 and [f.name for f in dataset.unreadable_files()] == ['a.png'] and len(files) == IMAGES


# Runs

def arguments(source, out, **more):
    options = dict(arch='resnet18_0.125x', size=32, batch_size=16, epochs=4, lr=.1, num_workers=0, save_every=2,
                   knn_every=0) | more
    return ['pretrain', str(source), '--out', str(out),
            *(str(w) for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v))]


def a_run(source, out, kill_at=None, more=None):
    torch.set_num_threads(1)
    if kill_at:
        write_line = HistoryCallback.after_batch
        def deadly(self):
            write_line(self)
            if self.learn.step == kill_at: os.kill(os.getpid(), 9)
        HistoryCallback.after_batch = deadly
    cli.main(arguments(source, out, **(more or {})))


def started(*args, **kwargs):
    process = forks.Process(target=a_run, args=args, kwargs=kwargs)
    process.start()
    process.join(240)
    return process.exitcode


def weights(out): return load_file(out/'encoder.safetensors')


@pytest.fixture(scope='module')
def straight(place):
    assert started(place/'folder', place/'straight') == 0
    return weights(place/'straight')


@pytest.mark.process
@pytest.mark.parametrize('name', ['shards', 'parquet'])
def test_killed_runs_over_shards_and_tables_end_with_the_weights_of_the_folder(place, sources, straight, name):
    out = place/f'run over {name}'
    assert started(sources[name], out, kill_at=5) == -9
    assert started(sources[name], out) == 0
    got = weights(out)
    assert all(torch.equal(got[k], straight[k]) for k in straight)
    assert {*read_history(out/'history.csv')['step']} == {*range(1, 11)}


@pytest.mark.process
def test_groups_from_a_table_and_other_groups_are_refused(place, sources, straight):
    out = place/'grouped'
    assert started(sources['parquet'], out, more=dict(positives='patient')) == 0
    assert any(not torch.equal(v, straight[k]) for k, v in weights(out).items())
    with pytest.raises(SystemExit, match='whose positives was patient, not None'):
        cli.main(arguments(sources['parquet'], out))
    with pytest.raises(SystemExit, match='no column doctor'):
        cli.main(arguments(sources['parquet'], place/'none', positives='doctor'))
    assert not (place/'none').exists()


def test_second_views_come_from_the_group(place, sources):
    "Every picture of a group is one flat gray: the second view shows whose it is."
    grays = [np.full((40, 40, 3), 10*i, np.uint8) for i in range(12)]
    groups = np.array([*np.arange(11)//4, 9])                                          # the last one alone
    images = replace(array_images(grays), groups=groups)
    dataset = TwoCropDataset(images, Augmentation(32, RandomResizedCrop()))
    drawn = {i: [] for i in range(12)}
    for epoch in range(60):
        for i in range(12):
            first, second = (int(v.float().mean().round())//10 for v in dataset[epoch, i][0])
            assert first == i
            drawn[i].append(second)
    for i in range(11): assert set(drawn[i]) == set(range(i//4*4, min(11, i//4*4 + 4))) - {i}
    assert set(drawn[11]) == {11}
    everyone = set(drawn[0]) | {0}
    dataset.images.files.get.data[1] = b'no picture'                                    # a partner that cannot be read
    again = [int(dataset[e, 0][0][1].float().mean().round())//10 for e in range(60)]
    assert set(again) == everyone - {0, 1}
