"An evaluation must not flatter: each fault is planted, and is named or rejected."
import io, json, shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import numpy as np, pytest, torch
from PIL import Image

from simclr_nb.commands import main as cli
from simclr_nb.data import datasets as data
from simclr_nb.features import logistic
from simclr_nb.evaluation import protocols
from simclr_nb.data.sources import train_test_splits
from simclr_nb.encoder import build_encoder, save_encoder
from simclr_nb.evaluation.candidates import Candidate, pixels_encoder
from simclr_nb.evaluation.protocols import EvalSettings, EvalSuite, run_protocol, run_protocols, summarize


def simclr(*args):
    "Run a command in this process: its exit status, and what it says."
    said, code = io.StringIO(), 0
    with redirect_stdout(said), redirect_stderr(said):
        try: cli.main([str(a) for a in args])
        except SystemExit as e: code = e.code
    if isinstance(code, str): return 1, said.getvalue() + code
    return code or 0, said.getvalue()


def works(result):
    code, said = result
    assert code == 0, said
    return said


def picture(c, i, side=24):
    "Stripes: their direction is the class, their width, place and brightness are luck."
    rng = np.random.default_rng(1000*c + i)
    y, x = np.mgrid[:side, :side]
    wave = np.sin((x if c else y)/rng.uniform(1, 3) + rng.uniform(0, 6))
    noisy = 120 + rng.uniform(20, 60)*wave + rng.normal(0, 40, (side, side))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert('RGB')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('stripes')
    for part, n in (('train', 40), ('test', 20)):
        for c in (0, 1):
            place = root/part/f'class{c}'
            place.mkdir(parents=True)
            for i in range(n): picture(c, i + 100*(part == 'test')).save(place/f'{i:02}.png')
    return root


@pytest.fixture(scope='module')
def runs(folder, tmp_path_factory):
    "Three runs of one recipe, each with a seed of its own."
    root = tmp_path_factory.mktemp('runs')
    for seed in range(3):
        works(simclr('pretrain', folder/'train', '--arch', 'resnet18_0.25x', '--size', 24, '-b', 20, '--epochs', 1,
            '--lr', .1, '--num-workers', 0, '--knn-every', 0, '--seed', seed, '--out', root/f'{seed}'))
    return [root/f'{seed}' for seed in range(3)]


def net(seed=0):
    torch.manual_seed(seed)
    return build_encoder('resnet18_0.25x', 24)


def suite(images, folder=None, **settings):
    pair = [Candidate('pixels', pixels_encoder(12), 24), Candidate('simclr', net(), 24)]
    return EvalSuite(pair, *train_test_splits(images), EvalSettings(num_workers=0, **settings), folder=folder)


def quiet(line): pass


# What the command says

def test_three_runs_are_one_mean_with_an_interval(folder, runs, tmp_path):
    said = works(simclr('evaluate', *runs, folder, '--baselines', 'pixels,pca,untrained', '--label-fractions', '0.2,1',
        '--seeds', '0,1', '--out', tmp_path/'report', '--num-workers', 0))
    report = json.loads((tmp_path/'report/report.json').read_text())
    assert report['evaluated_on']['runs'] == 3 and len(report['scores']) == 2*2*4
    for s in report['scores']:
        score, draws = s['balanced_accuracy'], 1 if (s['protocol'], s['fraction']) == ('knn', 1) else 2
        runs_of_it = 3 if s['encoder'] in ('simclr', 'untrained') else 1        # each began with weights of its own
        assert s['runs'] == runs_of_it and len(score['values']) == runs_of_it*draws and len(s['seeds']) == draws
        assert score['low'] <= score['mean'] <= score['high'] and 'chosen_on' in s['choice']
        assert ('p' in s) == ('difference' in s) == (s['encoder'] != 'simclr')
    assert '3 runs of pretraining' in said and '95% interval' in said and 'simclr is better by' in said
    assert 'Chosen for each encoder: neighbors and temperature (labeled images, each by the others)' in said
    names = {f.name for f in (tmp_path/'report/figures').iterdir()}
    assert names >= {'scores.png', 'labels_knn.png', 'labels_logreg.png', 'map.html'}


def test_runs_of_two_recipes_are_no_repetitions(folder, runs, tmp_path):
    other = shutil.copytree(runs[1], tmp_path/'other')
    config = json.loads((other/'config.json').read_text())
    (other/'config.json').write_text(json.dumps(config | dict(temperature=.5)))
    code, said = simclr('evaluate', runs[0], other, folder, '--num-workers', 0)
    assert code == 1 and 'differ in temperature (0.1 and 0.5)' in said and 'Traceback' not in said
    code, said = simclr('evaluate', folder)
    assert code == 1 and 'give an encoder or several runs, and last the labeled images' in said


def test_any_encoder_may_be_a_baseline(folder, runs, tmp_path):
    save_encoder(build_encoder('resnet18_0.125x', 32), tmp_path/'large.safetensors')
    baselines = f'supervised,{tmp_path/"large.safetensors"}'
    works(simclr('evaluate', runs[0], folder, '--baselines', baselines, '--protocol', 'knn', '--out', tmp_path/'report',
        '--num-workers', 0, '--finetune-epochs', 8))
    report = json.loads((tmp_path/'report/report.json').read_text())
    assert [s['encoder'] for s in report['scores']] == ['supervised', 'large', 'simclr']


# Planted faults

def test_a_penalty_at_the_edge_of_its_grid_is_named(folder, runs, tmp_path, monkeypatch):
    fixed = logistic.choose_penalty
    def peaked(reach, l2, extensions=0): return fixed(lambda p: [-v for v in p], l2, 0)      # the weaker the better
    monkeypatch.setattr(logistic, 'choose_penalty', peaked)
    said = works(simclr('evaluate', runs[0], folder, '--protocol', 'logreg', '--seeds', 0, '--out', tmp_path/'report',
        '--num-workers', 0))
    assert 'WARNING: at the end of the grid for simclr, logistic regression, 100% (1 of 1)' in said
    assert 'WARNING' in (tmp_path/'report/report.md').read_text()


def test_test_images_in_training_are_named(folder, runs, tmp_path):
    leaky = shutil.copytree(folder, tmp_path/'leaky')
    shutil.copy(leaky/'test/class0/07.png', leaky/'train/class0/innocent.png')
    said = works(simclr('evaluate', runs[0], leaky, '--protocol', 'knn', '--out', tmp_path/'report',
        '--num-workers', 0))
    assert 'WARNING: 1 test image is among the training images: 07.png is innocent.png (bytes)' in said


def choices(suite):
    rows, _ = run_protocols(suite, ['knn', 'logreg', 'linear'], [1.], [0], quiet)
    return [r['choice'] for r in rows]


def with_other_test_images(suite):
    "The same suite, with a test part whose features and labels are in disorder."
    order = np.random.default_rng(0).permutation(len(suite.test))
    suite.features = {key: (h, h_test[order]) for key, (h, h_test) in suite.features.items()}
    suite.test = replace(suite.test, labels=1 - suite.test.labels)
    return suite


def test_no_choice_depends_on_the_test_part(folder):
    assert choices(suite(folder, linear_epochs=1)) == choices(with_other_test_images(suite(folder, linear_epochs=1)))


def test_a_choice_on_the_test_part_would_be_seen(folder, monkeypatch):
    "The test above, with the fault planted: neighbors chosen by what they reach on the test images."
    def peeking(self, c, some, seed):
        bank, queries = self.features_of(c, some, seed)
        def reached(k):
            guess = protocols.NeighborClassifier(k).fit(bank, self.train.labels[some]).predict(queries)
            return (guess == self.test.labels).mean()
        choice = dict(k=max(range(1, 40), key=reached))
        return {'choice': choice, 'predictions': self.test.labels, 'balanced_accuracy': 0}
    monkeypatch.setattr(EvalSuite, 'knn', peeking)
    honest, other = suite(folder), with_other_test_images(suite(folder))
    one, two = ([r['choice'] for r in run_protocol(s, 'knn', 1., [0], quiet)] for s in (honest, other))
    assert one != two


def test_only_too_few_images_are_skipped(folder, monkeypatch):
    small = suite(folder)
    rows, skipped = run_protocols(small, ['knn', 'logreg'], [.03, 1.], [0], quiet)
    assert list(skipped) == ['knn, 3%', 'logreg, 3%'] and {r['fraction'] for r in rows} == {1.}
    def broken(self, c, some, seed): raise ValueError('something else')
    monkeypatch.setattr(EvalSuite, 'knn', broken)
    with pytest.raises(ValueError, match='something else'): run_protocols(small, ['knn'], [1.], [0], quiet)


# Cost

def test_each_image_is_decoded_once_for_all_encoders(folder, monkeypatch):
    opened, read = [], data.EvalDataset.__getitem__
    def counted(self, i):
        opened.append(self.images.files[i])
        return read(self, i)
    monkeypatch.setattr(data.EvalDataset, '__getitem__', counted)
    many = [Candidate('pixels', pixels_encoder(12), 24), Candidate('pca', pixels_encoder(12), 24),
            *[Candidate('untrained', net(i), 24, run=i) for i in range(2)], Candidate('simclr', net(3), 24)]
    EvalSuite(many, *train_test_splits(folder), EvalSettings(num_workers=0))
    assert len(opened) == len(set(opened)) == 120


def test_features_that_do_not_fit_go_to_a_folder_that_is_removed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, 'free_memory', lambda device='cpu': 1000)
    on_disk = suite(folder, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2                                  # training and test images
    monkeypatch.undo()
    in_memory = suite(folder)
    for key, parts in in_memory.features.items():
        for a, b in zip(parts, on_disk.features[key]): torch.testing.assert_close(a, b, rtol=0, atol=0)
    def scores(s): return summarize(run_protocols(s, ['knn', 'logreg'], [1.], [0], quiet)[0], s.test.labels)
    assert scores(on_disk) == scores(in_memory)
    del on_disk
    assert list(tmp_path.iterdir()) == []


def test_training_protocols_say_how_far_they_are(folder):
    said = []
    run_protocol(suite(folder, linear_epochs=1, rates=(.1,)), 'linear', 1., [0, 1], said.append)
    assert said[0].startswith('linear, 100% of the labels, simclr, run 1, seed 0: ') and '1 of 2, 0 min left' in said[0]
    assert said[-1].startswith('linear, 100% of the labels, simclr: ') and '±' in said[-1]
