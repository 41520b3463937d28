"""Studies: one that is killed twice finishes with the numbers of one that was not, and what is committed is in step."""
import json, os, re, signal, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from simclr_nb.grids import scales, studies
from simclr_nb.studies import read_records, results_file, run_point, runs_of, train_point, verdicts

root = Path(__file__).resolve().parents[1]
committed = root/'nbs/studies/results'
pages = sorted((root/'nbs/studies').glob('*.ipynb'))

def study(*args, **kwargs):
    env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'simclr_nb', 'study', *map(str, args)]
    return subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)

def results(out): return {t: r['result'] | dict(seconds=0) for t, r in read_records(results_file('broader', 'tiny', out)).items()}

def wait_for(n, out, job):
    "Until n results are in the file, or the job has ended."
    began = time.monotonic()
    while len(results(out)) < n and job.poll() is None:
        assert time.monotonic() - began < 300
        time.sleep(.02)

def test_a_study_that_is_killed_twice_finishes_with_the_same_numbers(tmp_path):
    for n in (1, 2):
        job = study('broader', '--scale', 'tiny', '--out', tmp_path/'killed')
        wait_for(n, tmp_path/'killed', job)
        job.send_signal(signal.SIGKILL)
        job.communicate()
        assert n <= len(results(tmp_path/'killed')) < 4
    last = study('broader', '--scale', 'tiny', '--out', tmp_path/'killed')
    said, error = last.communicate(timeout=600)
    assert last.returncode == 0, error
    assert 'the recipe' in said and 'verdict' in said and (tmp_path/'killed'/'broader-tiny.png').exists()
    halves = [study('broader', '--scale', 'tiny', '--out', tmp_path/'shared', '--part', f'{i}/2') for i in (1, 2)]
    assert all(job.communicate(timeout=600) and job.returncode == 0 for job in halves)
    assert results(tmp_path/'killed') == results(tmp_path/'shared') and len(results(tmp_path/'shared')) == 4

@pytest.mark.parametrize('args, words', [
    (('colour',), "no study 'colour'"), (('broader', '--part', '3/2'), 'a part is I/N'), (('broader', '--part', '1'), 'a part is I/N')])
def test_bad_words_are_one_line(args, words, tmp_path):
    job = study(*args, '--out', tmp_path)
    said, error = job.communicate(timeout=100)
    assert job.returncode and words in error and len(error.strip().splitlines()) == 1 and not list(tmp_path.iterdir())

def test_without_a_name_the_studies_are_listed_and_at_the_papers_scale_the_plan():
    said, _ = study().communicate(timeout=100)
    assert all(name in said for name in studies)
    said, _ = study('temperature', '--scale', 'paper').communicate(timeout=100)
    assert 'hours' in said and '31,200' in said                     # 100 epochs of 312 whole batches of 4,096

def different(t):
    "A training that differs from another in one setting, for each setting that a study changes."
    return {f: replace(t, **{f: v}) for f, v in dict(augment='crop', strength=.1, colors='simclrv1', one_branch=True,
        head='linear', projection_dim=16, loss='margin', temperature=.5, normalize=False, optimizer='sgd', lr=.01,
        batch_size=16, epochs=2, supervised=True, seed=1, images=80, arch='resnet18_0.25x').items()}

def test_every_setting_that_a_study_changes_reaches_the_run():
    tiny = scales['tiny']
    changed = {key for s in studies.values() for p in s.points('small') for key in p.changes}
    first = run_point(tiny)
    for field, t in different(tiny).items():
        result = run_point(t)
        assert any(result.get(k) != v for k, v in first.items() if k != 'seconds'), field
    assert changed - set(different(tiny)) <= {'lr_scaling'}
    rates = [train_point(replace(tiny, optimizer='lars', lr=None, lr_scaling=rule), read_images(tiny)).opt.hypers[0]['lr']
             for rule in ('linear', 'sqrt')]
    assert rates[0] != rates[1]

def read_images(t):
    from simclr_nb.studies import images_of
    return images_of(t)[0]


# What is committed

def files(): return sorted(committed.glob('*-small.jsonl'))

def test_committed_results_belong_to_the_plans_and_are_complete():
    assert len(files()) == len(pages)
    for file in files():
        name = file.stem.removesuffix('-small')
        records, runs = read_records(file), runs_of(name, 'small')
        assert {run.training for run in runs} == set(records), name
        for run in runs: assert 0 < records[run.training]['result']['linear'] < 100

def outputs_of(page):
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    found = [o['data'].get('text/markdown', '') for c in cells for o in c.get('outputs', []) if 'data' in o]
    return [text if isinstance(text, str) else ''.join(text) for text in found if text]

def test_pages_show_what_the_results_say():
    from simclr_nb.studies import study_table, verdict_table, what_was_run
    for page in pages:
        how = page.stem, 'small', committed
        for text in (what_was_run(*how), study_table(*how), verdict_table(*how)):
            assert not text or text in outputs_of(page), page.name

def test_the_results_page_is_in_step():
    from simclr_nb.studies import claims_table
    assert claims_table('small', committed) in outputs_of(root/'nbs/results.ipynb')
