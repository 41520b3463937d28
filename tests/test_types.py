"""Types: a checker has nothing to say of ordinary use, and the public face is annotated."""
import ast, json, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
checker = Path(sys.executable).with_name('basedpyright')
# Parameters and results of public functions that have no annotation yet; the number may fall, not rise.
not_annotated_yet = 101

def errors(file):
    "What the type checker calls an error, as (line, message)."
    done = subprocess.run([checker, '--level', 'error', '--outputjson', str(file)], cwd=root, capture_output=True,
                          text=True)
    found = json.loads(done.stdout)['generalDiagnostics']
    return [(e['range']['start']['line'] + 1, e['message']) for e in found if e['severity'] == 'error']

def public(tree):
    "The functions in `__all__`, and the methods of its classes that a user may call: pairs of (name, function)."
    lists = [n.value.elts for n in tree.body if isinstance(n, ast.Assign)
             and getattr(n.targets[0], 'id', None) == '__all__']
    names = [e.value for e in lists[0]] if lists else []
    for node in tree.body:
        if getattr(node, 'name', None) not in names: continue
        if isinstance(node, ast.FunctionDef): yield node.name, node
        if not isinstance(node, ast.ClassDef): continue
        for f in node.body:
            called = isinstance(f, ast.FunctionDef) and (not f.name.startswith('_') or f.name == '__init__')
            if called: yield f'{node.name}.{f.name}', f

def without_annotation(source):
    "Public parameters and results without a type, as `function(parameter)` and `function ->`."
    for name, f in public(ast.parse(source)):
        for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs):
            if a.arg not in ('self', 'cls') and a.annotation is None: yield f'{name}({a.arg})'
        if f.returns is None and not name.endswith('__init__'): yield f'{name} ->'

@pytest.mark.process
def test_ordinary_use_is_typed():
    pytest.importorskip('basedpyright')
    assert errors(root/'tests/ordinary_use.py') == []
    assert (root/'simclr_nb/py.typed').is_file()

@pytest.mark.process
def test_a_wrong_use_is_seen(tmp_path):
    pytest.importorskip('basedpyright')
    use = 'from simclr_nb.data.sets import folder_images\nfrom simclr_nb.learner import simclr_learner\n'
    use += 'simclr_learner("photos").pretrain("ten")\nfolder_images("photos").nowhere()\n'
    (tmp_path/'wrong.py').write_text(use)
    assert [line for line, _ in errors(tmp_path/'wrong.py')] == [3, 4]

def test_the_public_face_is_annotated():
    files = [f for f in (root/'simclr_nb').rglob('*.py') if f.stem not in ('__init__', '_modidx', 'all')]
    missing = [f'{f.relative_to(root)}: {what}' for f in files
               for what in without_annotation(f.read_text(encoding='utf-8'))]
    assert len(missing) <= not_annotated_yet, '\n'.join(sorted(missing))

def test_missing_annotations_are_seen():
    source = "__all__ = ['f', 'C']\ndef f(a, b:int): pass\ndef g(a): pass\n"
    source += 'class C:\n    def __init__(self, x): pass\n    def _h(self, y): pass\n    def k(self)->int: return 1\n'
    assert list(without_annotation(source)) == ['f(a)', 'f ->', 'C.__init__(x)']
