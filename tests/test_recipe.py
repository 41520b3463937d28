"The choice of the demo's recipe: what is changed, what is looked at, what is kept."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'bench'))
import recipe


def test_a_variant_changes_the_recipe():
    before, after = recipe.changed('recipe'), recipe.changed('temperature=.1,epochs=3,colors=simclrv1')
    changes = dict(temperature=.1, epochs=3, colors='simclrv1')
    assert after == before | changes and not changes.items() & before.items()
    assert type(after['epochs']) is int


def test_a_typing_error_is_told_before_anything_is_run(monkeypatch):
    monkeypatch.setattr(recipe, 'run', lambda *args: pytest.fail('something was run'))
    monkeypatch.setattr(sys, 'argv', ['recipe.py', 'recipe', 'temprature=.1'])
    with pytest.raises(SystemExit, match="'temprature=.1' changes nothing"): recipe.main()


def test_the_recipe_is_that_of_the_demo():
    "As the bench builds it, the augmentation is the preset's."
    from simclr_nb.data.sources import solar_augmentations
    def parts(augment): return [(type(t), vars(t)) for t in (augment.crop, *augment.transforms)]
    assert parts(recipe.augmentation(recipe.changed('recipe'))) == parts(solar_augmentations(64))
    assert parts(recipe.augmentation(recipe.changed('crop=.08'))) != parts(solar_augmentations(64))


def test_test_cells_have_no_say():
    from simclr_nb.data.sources import train_test_splits
    train, test = train_test_splits('solar_cells')
    fit, held_out = recipe.parts()
    files = [set(map(str, part.files)) for part in (train, test, fit, held_out)]
    assert files[2] | files[3] == files[0] and not files[2] & files[3] and not files[1] & (files[2] | files[3])


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch, capsys):
    ran = []
    def pretend(variant, seed):
        ran.append((variant, seed))
        return dict(variant=variant, seed=seed, train_seconds=1., **{c: 50. + seed for c in recipe.columns})
    monkeypatch.setattr(recipe, 'run', pretend)
    out = tmp_path/'runs.jsonl'
    for seeds in ('0', '0,1'):
        monkeypatch.setattr(sys, 'argv', ['recipe.py', 'recipe', 'pca', '--seeds', seeds, '--out', str(out)])
        recipe.main()
    assert ran == [('recipe', 0), ('pca', 0), ('recipe', 1), ('pca', 1)] and len(out.read_text().splitlines()) == 4
    assert '50.5 ± 0.7' in capsys.readouterr().out
