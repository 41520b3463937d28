"""The tour, on 512 pictures: it learns, it is short, and it stands alone.

Where CIFAR-10 is not on the disk, handwritten digits take its place, in folders laid out as CIFAR-10's.
"""
import json, os, re, sys, tempfile, textwrap
from pathlib import Path

import pytest

import forks

root = Path(__file__).resolve().parents[1]
notebook = root/'nbs/00_tour.ipynb'
sources = [''.join(cell['source']) for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']
           if cell['cell_type'] == 'code']
shown = [source for source in sources if '#| echo: false' not in source and '#| hide' not in source]

def lines_of(source):
    return [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith('#')]

def digits_as_cifar10(folder):
    "The 1,797 digits of scikit-learn, in color, as folder/train/0/0001.png and so on."
    from PIL import Image
    from sklearn.datasets import load_digits
    data = load_digits()
    for i, (image, label) in enumerate(zip(data.images, data.target)):
        file = folder/('test' if i % 3 == 0 else 'train')/str(label)/f'{i:04}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image*15.9).astype('uint8')).convert('RGB').resize((32, 32)).save(file)

@pytest.fixture(scope='module')
def pictures_home(tmp_path_factory):
    "The folder in which fastai finds data/cifar10."
    from fastai.data.external import fastai_path
    place = fastai_path('data')
    if (place/'cifar10/train').is_dir(): return place.parent
    home = tmp_path_factory.mktemp('fastai')
    digits_as_cifar10(home/'data/cifar10')
    return home

def run(home, *changes):
    "What comes of the cells that are shown, on 512 pictures for 8 epochs, with each change (old, new)."
    code = '\n'.join(shown)
    small = ('n_train, n_test, epochs = 10_000, 2_000, 5', 'n_train, n_test, epochs = 512, 500, 8')
    for old, new in (small, ('for seed in (1, 2):', 'for seed in ():'), ('batch_size=256', 'batch_size=64'), *changes):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    code += textwrap.dedent('''
        import json
        facts = {name: values[0].tolist() for name, values in results.items()}
        print(json.dumps(facts | {'first': np.mean(losses[:4]), 'last': np.mean(losses[-8:])}))
        ''')
    env = {**os.environ, 'FASTAI_HOME': str(home), 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': ''}
    with tempfile.TemporaryDirectory() as folder:                           # a file, so that an error shows its line
        script = Path(folder)/'tour.py'
        script.write_text(code, encoding='utf-8')
        done = forks.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

def learned(facts):
    "Does the loss fall from that of a guess, and are neighbors and linear probe better than the untrained network's?"
    falls = 4 < facts['first'] < 5.5 and facts['last'] < facts['first'] - .5          # a guess: ln 127 = 4.84
    return falls and all(after > before + 1 for before, after in zip(facts['untrained'], facts['SimCLR']))

@pytest.mark.process
def test_the_tour_learns_better_than_chance_and_than_no_training(pictures_home):
    facts = run(pictures_home)
    assert learned(facts) and min(facts['SimCLR']) > 20                              # percent; 10 is a guess

@pytest.mark.process
@pytest.mark.parametrize('change', [
    ('            optimizer.step()\n', ''),                                          # no step is taken
    ('[augment(pictures[i]) for _ in range(2) for i in batch]', '[augment(pictures[i]) for i in batch]*2')])  # one view
def test_a_loop_that_does_not_learn_is_seen(pictures_home, change): assert not learned(run(pictures_home, change))

@pytest.mark.process
def test_a_wrong_loss_is_caught_by_the_two_checks(pictures_home):
    for change in (('.fill_diagonal_(-torch.inf)', ''), ('.roll(len(z)//2)', '.roll(1)')):
        with pytest.raises(AssertionError, match='assert math.isclose'): run(pictures_home, change)

def test_it_is_short_and_stands_alone():
    code = [line for source in shown for line in lines_of(source)]
    assert len(code) <= 110 and not any('simclr_nb' in line for line in code)

def test_every_piece_links_to_its_chapter():
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    text = ''.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    chapters = [f.name for f in (root/'nbs').glob('*.ipynb') if re.match(r'0[1-7]_', f.name)]
    assert len(chapters) == 7
    rooms = 'data/08_datasets', 'features/01_extract', 'evaluation/02_linear', 'evaluation/03_finetune'
    for name in (*chapters, *(f'{room}.ipynb' for room in rooms)):
        assert f']({name})' in text, name
