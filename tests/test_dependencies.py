"""What the code imports is required, and what is required is imported: settings.ini is honest.

A package that only an extra installs is imported inside a function, and the module names the extra. Names of
packages inside strings count where they are looked up: `find_spec('x')`, `import_module('x')`, `need('x', ...)`.
"""
import ast, json, re, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

root = Path(__file__).resolve().parents[1]
for_the_house = 'dev', 'docs', 'bench'          # extras that the package itself has no use for

# Import names whose package has another name; any other name is the package's, but for - and _.
distributions = dict(PIL='pillow', cv2='opencv-python-headless', sklearn='scikit-learn', yaml='pyyaml',
    umap='umap-learn', faiss='faiss-cpu', skimage='scikit-image', IPython='ipykernel',
    matplotlib_inline='ipykernel')

# Required, and imported by no module of ours: who needs it.
needed_by_others = {
    'accelerate': 'fastai imports it in `Learner.distrib_ctx`, which trains on several processes',
    'tensorboard': 'torch imports it for the callback of `--log tensorboard`'}
# Looked for by tools and benchmarks, and declared nowhere: what it is.
by_hand = {
    'twine': 'checks a release where it is installed, see tools/release.py',
    'stable-pretraining': 'a contestant of bench/train.py, skipped where it is missing',
    'triton': 'comes with PyTorch where there is a GPU',
    'no-such-package': 'looked for in vain, to see what is said then'}


# What is required, what is imported

class Import(NamedTuple):
    package: str    # the name before the first dot
    file: str
    late: bool      # inside a function or a `try`: the module loads without it

def normal(name): return re.sub('[-_.]+', '-', name).lower()

def package_of(name):
    "The normalized name of the package that an import name comes from."
    return normal(distributions.get(name, name))

def name_in(requirement): return normal(re.match(r'[\w.-]+', requirement)[0])

def read(text):
    "(required packages, {extra: its packages}) of a settings.ini; an extra of extras holds theirs."
    settings = ConfigParser(interpolation=None)
    settings.read_string(text)
    lines = {name: found.strip().splitlines() for name, found in settings['extras'].items()}
    def packages(extra):
        for line in lines[extra]:
            if inner := re.match(r'simclr_nb\[(\w+)\]', line): yield from packages(inner[1])
            else: yield name_in(line)
    required = settings['project']['requirements'].strip().splitlines()
    return {name_in(r) for r in required}, {extra: set(packages(extra)) for extra in lines}

looks_up = 'find_spec', 'import_module', '__import__', 'importorskip', 'need'

def texts(node, loops):
    "The strings that an argument can be: one, or those that a loop goes through."
    if isinstance(node, ast.Name): return loops.get(node.id, [])
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []

def inner_loops(node, loops):
    "Names of loops with the strings they go through, in this node and around it."
    pairs = [(node.target, node.iter)] if isinstance(node, ast.For) else []
    pairs += [(g.target, g.iter) for g in getattr(node, 'generators', [])]
    return loops | {target.id: [t for e in found.elts for t in texts(e, {})] for target, found in pairs
                    if isinstance(target, ast.Name) and isinstance(found, (ast.Tuple, ast.List))}

def called(node): return getattr(node.func, 'id', None) or getattr(node.func, 'attr', None)

def names_of(node, loops):
    "The names that one node of a syntax tree imports."
    if isinstance(node, ast.Import): return [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom): return [] if node.level else [node.module]
    if not isinstance(node, ast.Call) or called(node) not in looks_up or not node.args: return []
    return [t for t in texts(node.args[0], loops) if t.replace('.', '').isidentifier()]

def nodes(source):
    "Every node of a source, with the loops around it and whether it is reached only when something is called."
    def walk(node, loops, late):
        loops = inner_loops(node, loops)
        late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try))
        yield node, loops, late
        for child in ast.iter_child_nodes(node): yield from walk(child, loops, late)
    return walk(ast.parse(source), {}, False)

def imports(source, file, local=()):
    "Every import of a source, without the standard library's, those named `local` and the package's own."
    own = {*sys.stdlib_module_names, *local, 'simclr_nb'}
    found = {Import(name.split('.')[0], file, late or isinstance(node, ast.Call))
             for node, loops, late in nodes(source) for name in names_of(node, loops)}
    return {i for i in found if i.package not in own}

def code(notebook):
    "The code of a notebook as plain Python."
    from IPython.core.inputtransformer2 import TransformerManager
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return '\n'.join(TransformerManager().transform_cell(s) for s in sources if not s.startswith('%%'))

def sources(*folders, notebooks=False):
    "{path: source} of the Python files below some folders, or of the notebooks."
    files = [f for folder in folders for f in sorted((root/folder).rglob('*.ipynb' if notebooks else '*.py'))]
    return {str(f.relative_to(root)): code(f) if notebooks else f.read_text(encoding='utf-8') for f in files}

def imports_of(sources, local=()):
    "Every import of some sources; `local` are modules that lie beside them."
    return sorted(set().union(*(imports(source, file, local) for file, source in sources.items())))


# The checks; each returns what is wrong

def not_required(found, required, extras):
    "Imports that nothing installs, and those of a module's first lines that only an extra installs."
    optional = set().union(*(packages for extra, packages in extras.items() if extra not in for_the_house))
    for i in found:
        package = package_of(i.package)
        if package in required: continue
        if package not in optional: yield f'{i.file} imports {i.package}: {package} is in no requirement and no extra'
        elif not i.late: yield f'{i.file} imports {i.package} when it loads: {package} is only in an extra'

def extra_not_named(found, sources, required, extras):
    "Packages of an extra that are imported, where none of the modules that do says which extra to install."
    for package in sorted({package_of(i.package) for i in found} - required):
        holds = [e for e, names in extras.items() if package in names and e not in for_the_house]
        files = sorted({i.file for i in found if package_of(i.package) == package})
        said = [n.value for file in files for n in ast.walk(ast.parse(sources[file]))
                 if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        named = [rf'simclr_nb\[{e}\]|^{e}$' for e in holds] + [rf'pip install {package}\b']
        if holds and not any(re.search(p, t) for p in named for t in said):
            yield f'{", ".join(files)}: {package} is imported, and the extra {" or ".join(holds)} is not named'

def wrong_extra(sources, extras):
    "Calls of `need(module, extra)` that name an extra that does not install the module."
    for file, source in sources.items():
        for node, loops, _ in nodes(source):
            if not isinstance(node, ast.Call) or called(node) != 'need' or len(node.args) < 2: continue
            for name, extra in product(names_of(node, loops), texts(node.args[1], loops)):
                if package_of(name.split('.')[0]) not in extras.get(extra, ()):
                    yield f'{file} needs {name}, which the extra {extra} does not install'

def not_imported(found, required, extras, excused):
    "Requirements that nothing imports, and excuses that nobody needs any more."
    used = {package_of(i.package) for i in found}
    users = {e: names for e, names in extras.items() if e not in for_the_house}
    for where, names in {'requirements': required, **users}.items():
        for name in sorted(names - used - set(excused)): yield f'{name} is in {where}, and no module imports it'
    for name in sorted(used & set(excused)): yield f'{name} is imported after all: take it out of the exceptions'

def not_declared(found, declared):
    "Imports of the tests, the tools, the benchmarks or the notebooks that no extra of ours installs."
    for i in found:
        if package_of(i.package) not in declared | set(by_hand):
            yield f'{i.file} imports {i.package}: {package_of(i.package)} is in no requirement and no extra'


# The house

text = (root/'settings.ini').read_text(encoding='utf-8')

def none(problems):
    problems = list(problems)
    assert not problems, '\n' + '\n'.join(problems)

@pytest.fixture(scope='module')
def ours():
    found = sources('simclr_nb')
    assert len(found) > 50
    return found

def test_what_is_imported_is_required(ours): none(not_required(imports_of(ours), *read(text)))

def test_optional_imports_name_their_extra(ours): none(extra_not_named(imports_of(ours), ours, *read(text)))

def test_the_extra_is_the_right_one(ours):
    none(wrong_extra(ours, read(text)[1]))
    assert sum(called(node) == 'need' for s in ours.values() for node, *_ in nodes(s) if isinstance(node, ast.Call)) > 5

def test_what_is_required_is_imported(ours): none(not_imported(imports_of(ours), *read(text), needed_by_others))

def test_the_rest_is_declared_too():
    required, extras = read(text)
    declared = required.union(*extras.values())
    files = sources('tests', 'tools', 'bench')
    notebooks, local = sources('nbs', notebooks=True), {Path(file).stem for file in files}
    none(not_declared(imports_of(files | notebooks, local), declared))

def test_no_extra_has_what_is_required():
    required, extras = read(text)
    assert not required & set().union(*extras.values())

def test_names_are_those_of_the_packages():
    "The table above agrees with the packages that are installed."
    installed = packages_distributions()
    for name, package in distributions.items():
        if name not in installed or package == 'ipykernel': continue
        assert package in map(normal, installed[name]), (name, installed[name])

def test_fastai_needs_accelerate():
    import fastai
    source = (Path(fastai.__file__).parent/'distributed.py').read_text(encoding='utf-8')
    assert re.search(r'def distrib_ctx\(.*import accelerate', source, re.S)


# The checks find what is planted

planted = """
[project]
requirements =
    torch>=2
    Scikit_Learn>=1
    lonely

[extras]
pictures =
    pillow
    unused; python_version > "3"
depth =
    pydicom>=2
dev =
    simclr_nb[pictures]
    pytest
"""

def found(source, file='a.py'): return sorted(imports(source, file))

def test_settings_are_read():
    required, extras = read(planted)
    assert required == {'torch', 'scikit-learn', 'lonely'} and extras['dev'] == {'pillow', 'unused', 'pytest'}

@pytest.mark.parametrize('source, want', [
    ('import torch.nn as nn, os', [('torch', False)]),
    ('from .core import x\nfrom simclr_nb import y\nfrom sklearn.svm import SVC', [('sklearn', False)]),
    ('def f():\n    import cv2', [('cv2', True)]),
    ('class A:\n    def f(self):\n        if 1: from PIL import Image', [('PIL', True)]),
    ('try: import faiss\nexcept ImportError: faiss = None', [('faiss', True)]),
    ("if find_spec('umap') and need('pydicom', 'DICOM'): pass", [('pydicom', True), ('umap', True)]),
    ("need('pyarrow.parquet', 'parquet')", [('pyarrow', True)]),
    ("for m in ('onnx', 'onnxscript'): need(m, 'export')", [('onnx', True), ('onnxscript', True)]),
    ("x = [core.need(m) for m in ['a', 'b']]", [('a', True), ('b', True)]),
    ("x = find_spec(name), print('torch')", [])])
def test_imports_are_found(source, want):
    assert [(i.package, i.late) for i in found(source)] == want

@pytest.mark.parametrize('source, problems', [
    ('import torch, sklearn', []), ('import scipy', ['scipy']), ('def f(): import scipy', ['scipy']),
    ('def f(): from PIL import Image', []), ('from PIL import Image', ['when it loads']),
    ('def f(): import pytest', ['pytest'])])
def test_a_missing_requirement_is_seen(source, problems):
    said = list(not_required(found(source), *read(planted)))
    assert len(said) == len(problems) and all(p in s for p, s in zip(problems, said))

@pytest.mark.parametrize('message, n', [
    ('pip install simclr_nb[depth]', 0), ('depth', 0), ('pip install pydicom', 0),
    ('pip install simclr_nb[pictures]', 1), ('in depth', 1)])
def test_a_wrong_extra_is_seen(message, n):
    source = f'def f():\n    try: import pydicom\n    except ImportError as e: raise ValueError({message!r}) from e'
    assert len(list(extra_not_named(found(source), {'a.py': source}, *read(planted)))) == n

@pytest.mark.parametrize('call, n', [
    ("need('pydicom', 'depth')", 0), ("need('PIL.Image', 'pictures')", 0), ("need('pydicom', 'pictures')", 1),
    ("need('pydicom', 'deep')", 1), ("[need(m, 'depth') for m in ('pydicom', 'PIL')]", 1)])
def test_an_extra_that_does_not_install_it_is_seen(call, n):
    assert len(list(wrong_extra({'a.py': call}, read(planted)[1]))) == n

def test_an_idle_requirement_is_seen():
    using = found('import torch, sklearn\ndef f(): import PIL, pydicom')
    said = list(not_imported(using, *read(planted), dict(torch='?')))
    assert [s.split()[0] for s in said] == ['lonely', 'unused', 'torch']
    assert 'requirements' in said[0] and 'pictures' in said[1] and 'exceptions' in said[2]

def test_an_undeclared_tool_is_seen():
    assert list(not_declared(found('import pytest, psutil'), {'pytest'}))[0].endswith('no requirement and no extra')

def test_magics_are_no_obstacle(tmp_path):
    cell = dict(cell_type='code', source=['%matplotlib inline\n', 'if 1:\n', '    !pip list\n', 'import torch'])
    (tmp_path/'a.ipynb').write_text(json.dumps(dict(cells=[cell])))
    assert [i.package for i in imports(code(tmp_path/'a.ipynb'), 'a')] == ['torch']
