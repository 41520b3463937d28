"""Copies, oddities and wrong labels: what is planted is found, and better than by the usual means.

`python tests/test_curate.py` prints recall and precision for solar cells, and for CIFAR-10 where it is present.
"""
import csv, io, os, warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from simclr_nb.commands import main as cli
from simclr_nb.using import curate, vectors
from simclr_nb.features import neighbors
from simclr_nb.core import write_json
from simclr_nb.data.sources import train_test_splits
from simclr_nb.data.sets import ImageSet
from simclr_nb.features.copies import thumbnails
from simclr_nb.encoder import build_encoder, load_encoder, save_encoder
from simclr_nb.features.extract import extract_features
from simclr_nb.features.neighbors import nearest
from simclr_nb.training.folder import clear_run
from simclr_nb.using.vectors import Vectors, read_vectors, write_vectors

root = Path(__file__).resolve().parents[1]
kept_encoder = root/'nbs/cifar10/encoder.safetensors'
cifar = Path.home()/'.fastai/data/cifar10'
sets = [pytest.param('solar_cells', id='solar cells'),
        pytest.param('cifar10', id='CIFAR-10', marks=pytest.mark.skipif(not cifar.is_dir(), reason='no CIFAR-10 here'))]


# Sets with planted faults

def smaller(im): return im.resize([s*2//3 for s in im.size], Image.BICUBIC)
def cropped(im): return im.crop([s*x//20 for x, s in zip((1, 1, 19, 19), (*im.size, *im.size))])
changes = {'bytes': None, 'compressed': lambda im: im, 'resized': smaller,
           'brightened': lambda im: ImageEnhance.Brightness(im).enhance(1.1), 'mirrored': ImageOps.mirror}

def copy_of(images, i, kind, folder):
    "A file that shows image i."
    path = folder/f'{kind}-{i}.{"jpg" if kind == "compressed" else "png"}'
    if kind == 'bytes': path.write_bytes(images.files[i].read_bytes())
    else: changes.get(kind, cropped)(images[i]).save(path, **dict(quality=50) if kind == 'compressed' else {})
    return path

@cache
def images_of(name):
    "Solar cells, or every tenth photograph of CIFAR-10."
    images, _ = train_test_splits(name)
    return images if name == 'solar_cells' else images.subset(range(0, len(images), 10))

def vectors_of(images): return extract_features(load_encoder(kept_encoder), images, 32, num_workers=0)[0]

@cache
def own_vectors(name): return vectors_of(images_of(name))

def with_copies(name, folder, seed, kinds=tuple(changes), n=10):
    "Every second image of a set, and copies; which picture each shows, and the kinds of the copies."
    images, rng, planted = images_of(name), np.random.default_rng(seed), []
    images = images.subset(range(0, len(images), 2))
    for kind in kinds: planted += [(int(i), kind) for i in rng.permutation(len(images))[:n]]
    files = [copy_of(images, i, kind, folder) for i, kind in planted]
    source = np.r_[np.arange(len(images)), [i for i, _ in planted]]
    return ImageSet(images.files + files), source, [kind for _, kind in planted]

def strangers(folder):
    "20 pictures of other things: photographs, text, noise."
    scenes = pytest.importorskip('skimage.data')
    names = ('astronaut', 'camera', 'coffee', 'cat', 'rocket', 'page', 'text', 'coins', 'moon', 'brick', 'grass',
             'gravel', 'hubble_deep_field', 'immunohistochemistry', 'clock', 'colorwheel', 'horse')
    pictures = [np.asarray(getattr(scenes, name)()) for name in names]
    pictures += [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(3)]
    for i, x in enumerate(pictures):
        Image.fromarray(x if x.dtype == np.uint8 else (x*255).astype(np.uint8)).convert('RGB').save(folder/f's{i}.png')
    return ImageSet(sorted(folder.glob('s*.png')))

def with_wrong_labels(y, n, seed):
    rng, y = np.random.default_rng(seed), np.array(y)
    wrong = rng.permutation(len(y))[:n]
    y[wrong] = (y[wrong] + rng.integers(1, y.max() + 1, n)) % (y.max() + 1)
    return y, wrong


# What is found: each returns (recall, precision)

def judged(copies, source, n):
    "Of n planted copies, the last images, and of the reported pairs."
    good = [c for c in copies if source[c.first] == source[c.second]]
    found = {i for c in good for i in (c.first, c.second) if i >= len(source) - n}
    return len(found)/n, len(good)/max(1, len(copies))

def copies_found(name, folder, seed=0, **more):
    images, source, kinds = with_copies(name, folder, seed, **more)
    copies = curate.find_copies(images)
    exact = [c for c in copies if c.reason == 'same bytes']
    return dict(curate=judged(copies, source, len(kinds)), bytes=judged(exact, source, len(kinds)))

def among_first(scores, n): return float((scores.argsort(descending=True)[:n] >= len(scores) - n).float().mean())

def strangers_found(folder):
    "20 strangers among solar cells."
    some, cells = strangers(folder), images_of('solar_cells')
    h = torch.cat([own_vectors('solar_cells'), vectors_of(some)])
    pixels = torch.cat([thumbnails(cells), thumbnails(some)])
    return {name: (among_first(curate.outlier_scores(x), 20),)*2 for name, x in dict(curate=h, pixels=pixels).items()}

def others_found():
    "20 photographs of other classes among those of one class, for ten classes."
    images, h, found = images_of('cifar10'), own_vectors('cifar10'), dict(curate=[], pixels=[])
    pixels = thumbnails(images)
    for c in range(10):
        others = np.random.default_rng(c).permutation(np.flatnonzero(images.labels != c))[:20]
        rows = np.r_[np.flatnonzero(images.labels == c), others]
        for name, x in dict(curate=h, pixels=pixels).items():
            found[name].append(among_first(curate.outlier_scores(x[rows]), 20))
    return {name: (np.mean(f),)*2 for name, f in found.items()}

def of_wrong(found, wrong): return np.isin(wrong, found).mean(), np.isin(found, wrong).mean()

def errors_found(name, seed=0):
    "30 wrong labels of solar cells, or 100 of CIFAR-10; cleanlab on scikit-learn's probabilities, as it is used."
    y, wrong = with_wrong_labels(images_of(name).labels, 30 if name == 'solar_cells' else 100, seed)
    h = own_vectors(name)
    ours = [s.image for s in curate.label_errors(y, curate.out_of_fold(h, y))]
    rows = {'curate': of_wrong(ours, wrong), 'curate, first': of_wrong(ours[:len(wrong)], wrong)}
    theirs = by_cleanlab(h, y)
    return rows | {'cleanlab': of_wrong(theirs, wrong), 'cleanlab, first': of_wrong(theirs[:len(wrong)], wrong)}

def by_cleanlab(h, y):
    issues = pytest.importorskip('cleanlab.filter').find_label_issues
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    p = cross_val_predict(model, h.numpy(), y, cv=5, method='predict_proba')
    return issues(y, p, return_indices_ranked_by='self_confidence', n_jobs=1).tolist()

@pytest.mark.parametrize('name', sets)
def test_copies_are_found_that_bytes_do_not_show(name, tmp_path):
    found = copies_found(name, tmp_path, seed=1)
    assert found['bytes'] == (.2, 1)
    assert found['curate'][0] >= .95 and found['curate'][1] >= .75

def test_every_change_is_found_and_named(tmp_path):
    images, source, kinds = with_copies('solar_cells', tmp_path, 2)
    reasons = {'bytes': {'same bytes'}, 'mirrored': {'mirrored'}}
    first, copies = len(source) - len(kinds), curate.find_copies(images)
    for kind in changes:
        planted = {first + j for j, k in enumerate(kinds) if k == kind}
        found = {c.second: c.reason for c in copies if c.second in planted and source[c.first] == source[c.second]}
        assert len(found) >= .9*len(planted), kind
        assert set(found.values()) <= reasons.get(kind, {'same picture', 'changed'}), (kind, found)

def test_a_crop_is_not_found_as_the_notebook_says(tmp_path):
    recall, _ = copies_found('solar_cells', tmp_path, kinds=('cropped',))['curate']
    assert recall <= .2

def test_strangers_are_found_that_pixels_do_not_show(tmp_path):
    found = strangers_found(tmp_path)
    assert found['curate'][0] >= .65 and found['curate'][0] >= found['pixels'][0] + .2

@pytest.mark.skipif(not cifar.is_dir(), reason='no CIFAR-10 here')
def test_other_classes_are_found_among_photographs_of_one():
    found = others_found()
    assert found['curate'][0] >= .4 and found['pixels'][0] <= .2

@pytest.mark.parametrize('name', sets)
def test_wrong_labels_are_found_with_fewer_suspects_than_cleanlab_names(name):
    found = errors_found(name, seed=1)
    assert found['curate'][0] >= .65 and found['curate'][1] >= 1.5*found['cleanlab'][1]
    assert found['curate'][1] >= dict(solar_cells=.2, cifar10=.09)[name]
    assert found['curate, first'][1] >= .45
    assert found['curate, first'][1] >= found['cleanlab, first'][1] - .06

def test_an_image_is_judged_by_a_classifier_that_has_not_seen_it():
    g = torch.Generator().manual_seed(0)
    h, y = torch.randn(60, 200, generator=g), torch.arange(60) % 2       # noise: nothing but memory separates it
    p = curate.out_of_fold(h, y)
    assert .3 < (p.argmax(1) == y).float().mean() < .7
    assert torch.allclose(p.sum(1), torch.ones(60))

def test_groups_and_labels_that_differ(tmp_path):
    cells = images_of('solar_cells')
    files = [copy_of(cells, 0, kind, tmp_path) for kind in ('bytes', 'mirrored')] + cells.files[:40]
    images = ImageSet(files, [1, 0] + [0]*40, ['sound', 'broken'])
    h = torch.cat([vectors_of(ImageSet(files))])
    v = Vectors([str(f.resolve()) for f in files], h, {})
    found = curate.curate_images(images, v)
    assert curate.copy_groups(found.copies)[0] == [0, 1, 2]
    rows = curate.copy_rows(found)
    assert ['same bytes, but the labels differ'] == [row[5] for row in rows if 'bytes' in row[5]]

def test_a_hundred_equal_files_make_one_group(tmp_path):
    cells = images_of('solar_cells')
    for i in range(100): (tmp_path/f'{i:03}.png').write_bytes(cells.files[3].read_bytes())
    images = ImageSet(sorted(tmp_path.glob('*.png')) + cells.files[:60])
    copies = curate.find_copies(images)
    groups = curate.copy_groups(copies)
    assert len(groups[0]) == 101 and groups[0][-1] == 103 and len(copies) <= 105


# The index

def in_clusters(n, d=32, clusters=500):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(clusters, d))
    x = centers[rng.integers(clusters, size=n)] + .5*rng.normal(size=(n, d))
    return F.normalize(torch.from_numpy(x).float(), dim=1)

def test_the_index_finds_nearly_all_neighbors(monkeypatch):
    pytest.importorskip('faiss')
    bank = in_clusters(120_000)
    queries, exact = bank[::100], nearest(bank, bank[::100], 10)
    used = []
    monkeypatch.setattr(neighbors, '_search', lambda *args, real=neighbors._search: used.append(1) or real(*args))
    sims, idxs = neighbors.NeighborIndex(bank).search(queries)
    assert used
    shared = [len(set(a) & set(b)) for a, b in zip(idxs.tolist(), exact[1].tolist())]
    assert np.mean(shared)/10 >= .95
    assert torch.allclose(sims, (bank[idxs]*queries[:, None]).sum(2), atol=1e-5)

def test_up_to_the_limit_and_for_few_queries_search_is_exact(monkeypatch):
    monkeypatch.setattr(neighbors.NeighborIndex, '_approximate', lambda *_: pytest.fail('an index was used'))
    bank = in_clusters(1500)
    found = neighbors.NeighborIndex(bank, 1500).search(bank, 7)
    assert all(torch.equal(a, b) for a, b in zip(found, nearest(bank, bank, 7)))
    neighbors.NeighborIndex(bank, 100).search(bank[:200], 7)

def test_without_the_package_search_is_exact_and_says_so(monkeypatch):
    monkeypatch.setattr(neighbors, 'find_spec', lambda name: None)
    bank = in_clusters(1500)
    with pytest.warns(UserWarning, match=r'1,500 vectors.*simclr_nb\[index\]'):
        found = neighbors.NeighborIndex(bank, 1000).search(bank, 7)
    assert all(torch.equal(a, b) for a, b in zip(found, nearest(bank, bank, 7)))

def test_hard_vectors_are_searched_until_enough_is_found():
    pytest.importorskip('faiss')
    bank = F.normalize(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    sims, _ = neighbors.NeighborIndex(bank, 1000).search(bank, 10)
    assert neighbors.recall_of(sims, nearest(bank, bank, 10)[0]) >= .95


# The command

def simclr(*args):
    said, code = io.StringIO(), 0
    with redirect_stdout(said), redirect_stderr(said):
        try: cli.main(args)
        except SystemExit as e: code = e.code
    return (1, said.getvalue() + code) if isinstance(code, str) else (code or 0, said.getvalue())

def works(*args):
    code, said = simclr(*args)
    assert code == 0, said
    return said

def refused(*args):
    code, said = simclr(*args)
    assert code in (1, 2) and 'Traceback' not in said, said
    return ' '.join(said.replace('│', ' ').split())

def rows_of(file):
    with open(file, newline='', encoding='utf-8') as f: return list(csv.DictReader(f))

def files_in(folder):
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob('*') if f.is_file()}

@pytest.fixture
def run(tmp_path):
    "The folder of a run, and beside it 60 images in two classes and one that is alone in its class."
    save_encoder(load_encoder(kept_encoder), tmp_path/'run/encoder.safetensors')
    write_json(tmp_path/'run/config.json', dict(versions=dict(simclr_nb='0')))
    cells = images_of('solar_cells')
    for i in range(60):
        name = 'data/poly' if cells.labels[i] > 1 else 'data/mono'
        (tmp_path/name).mkdir(parents=True, exist_ok=True)
        (tmp_path/name/f'{i:02}.png').write_bytes(cells.files[i].read_bytes())
    (tmp_path/'data/lone').mkdir()
    cells[70].save(tmp_path/'data/lone/a, "b".png')
    first = sorted((tmp_path/'data/mono').glob('*.png'))[0]
    (tmp_path/'data/poly/again.png').write_bytes(first.read_bytes())
    (tmp_path/'data/poly/broken.png').write_text('no image')
    return tmp_path/'run'

def curated(run, *more): return 'curate', str(run), str(run.parent/'data'), '--num-workers', '0', *more

def test_lists_and_page(run):
    said = works(*curated(run))
    assert 'unreadable files, left out: 1' in said and '1 class with one image not checked' in said
    assert '1 same bytes' in said
    copies, odd, labels = (rows_of(run/'curate'/f'{name}.csv') for name in ('duplicates', 'outliers', 'labels'))
    assert [row['reason'] for row in copies if 'bytes' in row['reason']] == ['same bytes, but the labels differ']
    assert len(odd) == 62 and any(row['path'].endswith('a, "b".png') for row in odd)
    scores = [float(row['score']) for row in odd]
    assert scores == sorted(scores, reverse=True)
    assert {row['label'] for row in labels} <= {'mono', 'poly'}
    assert all(Path(row['path']).is_file() and row['reason'] for row in copies + odd + labels)
    page = (run/'curate/curate.html').read_text()
    assert page.count('<h2>') == 3 and 'http:' not in page and 'https:' not in page and 'src="data:image/jpeg' in page

def test_nothing_is_overwritten_or_computed_before_the_settings_are_known_to_work(run, monkeypatch):
    works(*curated(run))
    before = files_in(run)
    monkeypatch.setattr(vectors, 'embed_images', lambda *_, **__: pytest.fail('vectors were computed'))
    assert 'duplicates.csv is there already: give --overwrite' in refused(*curated(run))
    assert 'say with --out' in refused('curate', str(run/'encoder.safetensors'), str(run.parent/'data'))
    assert 'is a file' in refused(*curated(run, '--out', str(run/'config.json')))
    assert 'ENCODER DATA' in refused('curate', str(run))
    assert 'no folder' in refused('curate', str(run), str(run.parent/'gone'), '--overwrite')
    assert 'simclr embed writes them' in refused(*curated(run, '--overwrite', '--vectors', 'gone.npz'))
    assert files_in(run) == before

def test_what_fails_leaves_the_old_lists(run, monkeypatch):
    works(*curated(run))
    before = files_in(run)
    def fail(*_, **__): raise ValueError('the disk burns')
    monkeypatch.setattr(curate, 'find_copies', fail)
    assert 'the disk burns' in refused(*curated(run, '--overwrite'))
    assert files_in(run) == before

def test_vectors_are_used_only_where_they_fit(run, monkeypatch):
    works('embed', str(run), str(run.parent/'data'), '--num-workers', '0')
    counted, real = [], vectors.embed_images
    monkeypatch.setattr(vectors, 'embed_images', lambda *a, **k: counted.append(1) or real(*a, **k))
    assert f'vectors: {run}/vectors.safetensors' in works(*curated(run)) and not counted
    file = sorted((run.parent/'data/mono').glob('*.png'))[1]
    os.utime(file, (2e9, 2e9))
    assert f'{file.name} has changed since' in works(*curated(run, '--overwrite')) and len(counted) == 1
    os.utime(file, (1e9, 1e9))
    (run.parent/'data/mono/new.png').write_bytes(file.read_bytes())
    assert 'new.png is not among them' in works(*curated(run, '--overwrite')) and len(counted) == 2
    assert 'not those of these images' in refused(
        *curated(run, '--overwrite', '--vectors', str(run/'vectors.safetensors')))

def test_vectors_of_another_encoder_are_refused_or_made_anew(run):
    works('embed', str(run), str(run.parent/'data'), '--num-workers', '0')
    save_encoder(build_encoder('resnet18_0.25x', 32), run/'encoder.safetensors')
    named = '--vectors', str(run/'vectors.safetensors')
    assert 'of another encoder' in refused(*curated(run, *named)) and not (run/'curate').exists()
    assert 'computed anew, because the vectors are of another encoder' in works(*curated(run))

def test_vectors_that_are_not_finite_are_named(run):
    works('embed', str(run), str(run.parent/'data'), '--num-workers', '0')
    v = read_vectors(run/'vectors.safetensors')
    v.h[7] = torch.nan
    write_vectors(run/'vectors.safetensors', v)
    said = refused(*curated(run))
    assert 'not finite' in said and Path(v.paths[7]).name in said and not (run/'curate').exists()

@pytest.mark.parametrize('n', [1, 2])
def test_too_few_images_are_an_error(run, n):
    few = run.parent/'few'
    few.mkdir()
    for i in range(n): images_of('solar_cells')[i].save(few/f'{i}.png')
    assert f'3 readable images or more, got {n}' in refused('curate', str(run), str(few), '--num-workers', '0')

@pytest.mark.parametrize('n', [3, 4, 11])
def test_a_few_images_are_enough(run, n):
    few = run.parent/'few'
    few.mkdir()
    for i in range(n - 1): images_of('solar_cells')[i].save(few/f'{i}.png')
    images_of('solar_cells')[0].resize((200, 200)).save(few/'again.png')
    said = works('curate', str(run), str(few), '--num-workers', '0')
    assert 'labels: none, so none are checked' in said and len(rows_of(run/'curate/outliers.csv')) == n
    pairs = {(Path(row['path']).name, Path(row['copy']).name) for row in rows_of(run/'curate/duplicates.csv')}
    assert pairs == {('0.png', 'again.png')}

def test_labels_from_before_go_where_there_are_none_now(run):
    works(*curated(run))
    assert (run/'curate/labels.csv').exists()
    works('curate', str(run), str(run.parent/'data/mono'), '--num-workers', '0', '--overwrite')
    assert not (run/'curate/labels.csv').exists()

def test_a_run_that_begins_anew_takes_its_lists_with_it(run):
    works(*curated(run))
    (run/'curate/mine.txt').write_text('mine')
    clear_run(run)
    assert {name for name in files_in(run)} == {'curate/mine.txt'}

def test_names_in_any_bytes(run):
    odd = os.fsdecode(os.fsencode(str(run.parent/'data/mono/')) + b'/caf\xe9 \xff<b>.png')
    Path(odd).write_bytes(sorted((run.parent/'data/mono').glob('*.png'))[2].read_bytes())
    works(*curated(run))
    page, pairs = ((run/'curate'/name).read_text(encoding='utf-8') for name in ('curate.html', 'duplicates.csv'))
    assert 'caf\\' in pairs and 'caf\\' in page and '<b>.png' not in page


# The map

def test_embed_writes_what_embedding_atlas_takes(run):
    parquet = pytest.importorskip('pyarrow.parquet')
    out = run/'map.parquet'
    embed = 'embed', str(run), str(run.parent/'data'), '--num-workers', '0', '--map'
    assert 'got vectors.safetensors' in refused(*embed)
    said = works(*embed, '--out', str(out))
    assert f'embedding-atlas {out} --x x --y y --neighbors neighbors --image image' in said
    table = parquet.read_table(out)
    assert {'path', 'vector', 'x', 'y', 'neighbors', 'image', 'label'} == set(table.column_names) and len(table) == 62
    cell = table['neighbors'][0].as_py()
    assert set(cell) == {'ids', 'distances'} and len(cell['ids']) == 10 and 0 not in cell['ids']
    assert cell['distances'] == sorted(cell['distances'])
    names = {Path(p).parent.name == label for p, label in zip(table['path'].to_pylist(), table['label'].to_pylist())}
    assert names == {True}
    assert read_vectors(out).h.shape == (62, 128)
    assert 'is there already' in refused(*embed, '--out', str(out))


# The report

def report(folder):
    "Lines of set, fault, way, recall and precision, over three seeds."
    warnings.simplefilter('ignore')
    names = ['solar_cells'] + ['cifar10']*cifar.is_dir()
    for name in names:
        for what, found in (('copies', copies_found), ('labels', lambda n, _, seed: errors_found(n, seed))):
            results = []
            for seed in range(3):
                (folder/f'{name}{what}{seed}').mkdir()
                results.append(found(name, folder/f'{name}{what}{seed}', seed=seed))
            for way in results[0]: yield name, what, way, *np.mean([r[way] for r in results], 0)
    for way, pair in strangers_found(folder).items(): yield 'solar_cells', '20 strangers', way, *pair
    if cifar.is_dir():
        for way, pair in others_found().items(): yield 'one class', '20 others', way, *pair

if __name__ == '__main__':
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        print(f'{"set":14}{"planted":14}{"way":18}{"recall":>8}{"precision":>11}')
        for name, what, way, recall, precision in report(Path(d)):
            print(f'{name:14}{what:14}{way:18}{recall:8.2f}{precision:11.2f}')
