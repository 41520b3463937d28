"""A release as far as this machine goes: checks, builds, tags. `make release` runs it.

1. Check: the version is one and the same everywhere, the tree is clean, the version has no tag yet, and
   CHANGELOG.md says what is new.
2. Test: `make test`, unless it has passed on this very commit.
3. Build the source distribution and the wheel from what is committed, and look at what they hold.
4. Tag the commit. Nothing is pushed or uploaded; what to do next is printed.
"""
import argparse, io, re, subprocess, sys, tarfile, tempfile, zipfile
from email import message_from_bytes
from importlib.util import find_spec
from pathlib import Path

root, package = Path(__file__).resolve().parents[1], 'simclr_nb'

def git(folder, *command, **kw):
    done = subprocess.run(['git', *command], cwd=folder, capture_output=True, **kw)
    if done.returncode: raise SystemExit(f"git {command[0]}: {done.stderr.decode().strip()}")
    return done.stdout

def said(folder, *command): return git(folder, *command).decode().strip()


# 1 Check; each returns what is wrong

def versions(folder):
    "The version by the file that names it; None where a file names none. In CHANGELOG.md the newest."
    places = {f'{package}/__init__.py': r'__version__ = "(.+)"', 'CITATION.cff': r'version: (.+)',
              'CHANGELOG.md': r'## (.+)'}
    found = {name: re.search(f'^{p}$', (folder/name).read_text(encoding='utf-8'), re.M) for name, p in places.items()}
    return {name: match and match[1] for name, match in found.items()}

def differing(folder):
    found = versions(folder)
    if len({*found.values()}) > 1 or None in found.values():
        yield 'the version differs: ' + ', '.join(f'{version} in {name}' for name, version in found.items())

def version_of(folder): return versions(folder)[f'{package}/__init__.py']

def entry(folder, version):
    "What CHANGELOG.md says of a version; None if nothing."
    text = (folder/'CHANGELOG.md').read_text(encoding='utf-8')
    found = re.search(rf'^## {re.escape(version)}\n(.*?)(?=^## |\Z)', text, re.M | re.S)
    return found[1].strip() or None if found else None

def changelog(folder):
    version = version_of(folder)
    told = entry(folder, version)
    if not told: yield f'CHANGELOG.md has nothing to say under `## {version}`'
    elif 'TODO' in told: yield f'CHANGELOG.md has a TODO under `## {version}`'

def changes(folder):
    if found := said(folder, 'status', '--porcelain'): yield f'the tree is not clean:\n{found}'

def tagged(folder):
    tag = f'v{version_of(folder)}'
    if said(folder, 'tag', '--list', tag): yield f'the tag {tag} is there already: raise the version'

def problems(folder): return [p for check in (differing, changelog, changes, tagged) for p in check(folder)]


# 2 Test

def is_tested(folder, marker):
    "Whether `make test` passed on this commit: it then leaves the commit's name in a file."
    return marker.is_file() and marker.read_text().strip() == said(folder, 'rev-parse', 'HEAD')


# 3 Build

def build(folder):
    "Make the source distribution and, from it, the wheel in dist/, from the files of the last commit."
    dist, version = folder/'dist', version_of(folder)
    for old in dist.glob(f'{package}-{version}*'): old.unlink()
    with tempfile.TemporaryDirectory() as source:
        zipfile.ZipFile(io.BytesIO(git(folder, 'archive', '--format=zip', 'HEAD'))).extractall(source)
        command = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, source]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stdout + done.stderr)
    return sorted(dist.glob(f'{package}-{version}*'))

def missing(folder, built):
    "What the two files should hold and do not, and what their metadata get wrong."
    version, files = version_of(folder), said(folder, 'ls-files', package).splitlines()
    kinds = [path.suffix for path in built]
    if kinds != ['.whl', '.gz']: return [f'not a wheel and a source distribution: {[p.name for p in built]}']
    wheel, sdist = zipfile.ZipFile(built[0]), tarfile.open(built[1])
    inside = {'wheel': set(wheel.namelist()), 'source distribution': {n.split('/', 1)[-1] for n in sdist.getnames()}}
    wrong = [f'the {kind} lacks {file}' for kind, names in inside.items() for file in files if file not in names]
    wrong += [f'the source distribution lacks {file}' for file in ('setup.py', 'pyproject.toml', 'settings.ini',
              'README.md', 'LICENSE') if file not in inside['source distribution']]
    meta = message_from_bytes(wheel.read(f'{package}-{version}.dist-info/METADATA'))
    if meta['Version'] != version: wrong.append(f'the wheel is of version {meta["Version"]}')
    if not meta.get_payload().strip(): wrong.append('the wheel has no description')
    if find_spec('twine'):
        done = subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *map(str, built)],
                              capture_output=True, text=True)
        if done.returncode: wrong.append(done.stdout + done.stderr)
    return wrong


# 4 Tag

def tag(folder):
    version = version_of(folder)
    message = f'{package} {version}\n\n{entry(folder, version)}\n'
    git(folder, 'tag', '-a', f'v{version}', '--cleanup=verbatim', '-F', '-', input=message.encode())
    return f'v{version}'

def next_steps(folder, name, built):
    files = ' '.join(str(p.relative_to(folder)) for p in built)
    return f'''
{name} is ready, and nothing has left this machine. To publish it:

    git push origin HEAD {name}
    python -m pip install twine
    python -m twine upload {files}

After that, raise the version in {package}/__init__.py and CITATION.cff, and begin an entry in CHANGELOG.md.
To take the release back instead: git tag -d {name}'''

def refuse(found):
    if found: raise SystemExit('\n'.join(['No release:', *(f'- {p}' for p in found)]))

def main(args=None, folder=root):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--tested', type=Path, default=folder/'.venv/.tested', help='where `make test` leaves its mark')
    args = parser.parse_args(args)
    refuse(problems(folder))
    if not is_tested(folder, args.tested):
        if subprocess.run(['make', 'test'], cwd=folder).returncode:
            refuse(['the tests do not pass'])
        refuse(problems(folder))                                 # the tests have left the tree as it was
    built = build(folder)
    refuse(missing(folder, built))
    print(next_steps(folder, tag(folder), built))

if __name__ == '__main__': main()
