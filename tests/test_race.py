"The race: what it prints follows from its runs, and a run is what the settings say."
import json, sys
from pathlib import Path

import pytest

import forks

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'bench'))
import train                                               # noqa: E402


def run(contestant, seed, rate, accuracy, mb=100):
    return dict(contestant=contestant, seed=seed, images_per_second=rate, accuracy={'test 2': accuracy}, peak_mb=mb)


def test_the_table_pairs_runs_by_seed():
    runs = [run('torchvision', 0, 200, 41), run('torchvision', 1, 240, 45), run('lightly', 0, 100, 40),
            run('lightly', 1, 200, 42), run('bare', 0, 400, 0)]
    runs[-1]['accuracy'] = {}
    lines = list(train.table(runs, ['torchvision', 'lightly', 'bare']))
    assert '| torchvision | 2 | 220 ± 28 | 43.0 ± 2.8 | 100 |' in lines
    assert '| bare | 1 | 400 |  | 100 |' in lines
    pair = next(line for line in lines if line.startswith('- torchvision / lightly'))
    assert '1.60 times as fast (1.20 to 2.00)' in pair     # of 2.0 and 1.2, not of the means
    assert 'test 2: +2.0 ± 12.7' in pair                   # differences 1 and 3: t = 12.7, standard error 1


def test_a_line_that_was_cut_off_is_run_again(tmp_path):
    file = tmp_path/'runs.jsonl'
    file.write_text(json.dumps(run('lightly', 0, 1, 2)) + '\n{"contestant": "li')
    assert [r['seed'] for r in train.finished(file)] == [0]
    assert train.finished(tmp_path/'none.jsonl') == []


def race(tmp_path, *more):
    command = [sys.executable, root/'bench/train.py', '--images', '48', '--queries', '24', '--size', '32', '--arch',
               'resnet18_0.125x', '--batch-size', '16', '--lengths', '1,2', '--threads', '1', '--workers', '0',
               '--out', tmp_path/'race.jsonl', *more]
    return forks.run([str(c) for c in command], capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.process
@pytest.mark.parametrize('contestants', ['simclrv1,bare'])
def test_a_race(tmp_path, contestants):
    done = race(tmp_path, '--contestants', contestants)
    assert done.returncode == 0, done.stderr
    runs = train.finished(tmp_path/'race.jsonl')
    assert [r['contestant'] for r in runs] == contestants.split(',')
    ours, bare = runs
    marks = {f'{part} {epoch}' for part in ('test', 'validation') for epoch in (1, 2)}
    assert set(ours['accuracy']) == marks and not bare['accuracy']
    assert all(0 <= v <= 100 for v in ours['accuracy'].values()) and ours['peak_mb'] > 100
    assert abs(sum(ours['shares'].values()) - 1) < .01 and min(ours['shares'].values()) > 0
    assert abs(ours['images_per_second']*ours['seconds'] - 2*48) < 2
    before = (tmp_path/'race.jsonl').read_text()
    again = race(tmp_path, '--contestants', contestants)   # nothing is left to run
    assert again.stdout == done.stdout and (tmp_path/'race.jsonl').read_text() == before


@pytest.mark.process
def test_unknown_contestants_are_named(tmp_path):
    done = race(tmp_path, '--contestants', 'ours')
    assert done.returncode and 'no contestant ours' in done.stderr


def test_the_judge_knows_a_good_encoder_from_a_bad_one(tmp_path):
    import numpy as np, torch
    from PIL import Image
    from simclr_nb.data.sets import ImageSet
    rng, files, labels = np.random.default_rng(0), [], []
    for i in range(200):                                   # class: which half is bright
        x = rng.integers(0, 60, (8, 8, 3)).astype(np.uint8)
        x[:, :4] += np.uint8(120*(i % 2))
        x[:, 4:] += np.uint8(120*(1 - i % 2))
        files.append(tmp_path/f'{i}.png')
        Image.fromarray(x).save(files[-1])
        labels.append(i % 2)
    bank, queries = ImageSet(files[:100], labels[:100]), ImageSet(files[100:], labels[100:])
    pixels = torch.nn.Flatten()
    blind = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    good, bad = (train.judge(e, bank, dict(test=queries), 8)['test'] for e in (pixels, blind))
    assert good == 100 and bad < 75
