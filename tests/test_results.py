"The pages of the studies and the results page show what the committed results say, all of it and nothing else."
import json
from pathlib import Path

import pytest
from simclr_nb.studies.grids import studies
from simclr_nb.studies.results import (claims_table, overview, read_records, results_file, runs_left, runs_of,
                               study_table, verdict_table, what_was_run)

nbs = Path(__file__).resolve().parents[1]/'nbs'
committed = nbs/'studies/results'
pages = sorted(file.stem for file in (nbs/'studies').glob('[a-z]*.ipynb'))

def shown(file):
    "What the cells of a notebook show as Markdown."
    cells = [c for c in json.loads(file.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    outputs = [o.get('data', {}) for c in cells for o in c['outputs']]
    return [''.join(data['text/markdown']) for data in outputs if 'text/markdown' in data]

def test_every_complete_study_has_a_page_and_every_page_is_listed():
    assert pages == sorted(name for name in studies if not runs_left(name, 'small', committed)) and pages
    site = (nbs.parent/'_quarto.yml').read_text()
    assert all(f'studies/{name}.ipynb' in site for name in pages) and 'results.ipynb' in site

@pytest.mark.parametrize('name', pages)
def test_a_page_shows_its_results(name):
    tables = [table(name, 'small', committed) for table in (what_was_run, verdict_table, study_table)]
    assert shown(nbs/'studies'/f'{name}.ipynb') == [table for table in tables if table]

def test_every_result_belongs_to_a_study():
    wanted = {run.training for name in studies for run in runs_of(name, 'small')}
    assert set(read_records(results_file('small', committed))) <= wanted

def test_the_results_page_shows_every_claim():
    tables = shown(nbs/'results.ipynb')
    assert claims_table('small', committed) in tables and overview('small', committed) in tables

def test_the_front_page_shows_the_scores_of_the_run():
    page = (nbs.parent/'README.md').read_text(encoding='utf-8').replace('**', '')
    for name in ('few', 'report'):
        scores = json.loads((nbs/'cifar10'/f'{name}.json').read_text())['scores']
        wanted = [s['balanced accuracy'] for s in scores if s['protocol'] == 'logreg' and s['encoder'] != 'pca']
        assert len(wanted) >= 3 and all(f"{m['mean']:.1f} ({m['low']:.1f} to {m['high']:.1f})" in page for m in wanted)
