"Studies: one that is killed twice finishes with the numbers of one that was not; every setting reaches the run."
import os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest
import forks
from simclr_nb.studies.grids import scales, studies
from simclr_nb.studies.points import images_of, train_point
from simclr_nb.studies.results import read_records, results_file

root = Path(__file__).resolve().parents[1]

def study(*args):
    env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'simclr_nb', 'study', *map(str, args)]
    return forks.Popen(command, cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def results(out):
    records = read_records(results_file('tiny', out))
    return {t: record['result'] | dict(seconds=0) for t, record in records.items()}

def wait_for(n, out, job):
    "Until n results are in the file, or the job has ended."
    began = time.monotonic()
    while len(results(out)) < n and job.poll() is None:
        assert time.monotonic() - began < 300
        time.sleep(.02)

@pytest.mark.process
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

@pytest.mark.process
@pytest.mark.parametrize('args, words', [
    (('colour',), "no study 'colour'"), (('broader', '--part', '3/2'), 'a part is I/N'),
    (('broader', '--part', '1'), 'a part is I/N')])
def test_bad_words_are_one_line(args, words, tmp_path):
    job = study(*args, '--out', tmp_path)
    said, error = job.communicate(timeout=100)
    assert job.returncode and words in error and len(error.strip().splitlines()) == 1 and not list(tmp_path.iterdir())

@pytest.mark.process
def test_without_a_name_the_studies_are_listed_and_at_the_papers_scale_the_plan():
    said, _ = study().communicate(timeout=100)
    assert all(name in said for name in studies)
    said, _ = study('temperature', '--scale', 'paper').communicate(timeout=100)
    assert 'hours' in said and '31,279' in said                     # the steps of `simclr pretrain --recipe imagenet`

def weights(t):
    "A number that two networks share only if they are the same."
    model = train_point(t, images_of(t)[0]).model
    return sum(float(p.detach().double().abs().sum()) for p in model.parameters())

def different(t):
    "A training that differs from another in one setting, for each setting that a study changes."
    return {f: replace(t, **{f: v}) for f, v in dict(augment='crop', strength=.1, colors='simclrv1', one_branch=True,
        head='linear', projection_dim=16, loss='margin', temperature=.5, normalize=False, optimizer='sgd', lr=.01,
        batch_size=16, epochs=2, supervised=True, seed=1, images=80, norm_pictures=4, arch='resnet18_0.25x').items()}

def test_every_setting_that_a_study_changes_reaches_the_run():
    tiny = scales['tiny']
    changed = {key for s in studies.values() for p in s.points('small') for key in p.changes}
    first = weights(tiny)
    assert weights(tiny) == first
    for field, t in different(tiny).items(): assert weights(t) != first, field
    assert changed - set(different(tiny)) <= {'lr_scaling', 'labels'}
    labels = [replace(tiny, supervised=True, labels=n) for n in (None, 64)]
    assert weights(labels[0]) != weights(labels[1])
    rules = [replace(tiny, optimizer='lars', lr=None, lr_scaling=rule) for rule in ('linear', 'sqrt')]
    rates = [train_point(t, images_of(tiny)[0]).opt.hypers[0]['lr'] for t in rules]
    assert rates[0] != rates[1]
