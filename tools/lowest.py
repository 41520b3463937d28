"""The lowest versions that settings.ini allows, as pins for pip; `make lowest` runs the tests with them.

uv solves the task that pip has, downwards: what settings.ini names gets its lowest version, and what those need in
turn stays free. The extras for users count, too; those for this house (dev, docs, bench) do not. Where nbdev, which
runs the notebooks, needs a newer version, it gets that.

    python tools/lowest.py > lowest.txt          # for the Python that runs this
    pip install -c lowest.txt -e '.[dev]'
"""
import re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
for_the_house = 'dev', 'docs', 'bench'

def name_of(requirement): return re.sub('[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()

def requirements(text):
    "(what a user can ask for, the line of dev that names nbdev) in a settings.ini."
    settings = ConfigParser(interpolation=None)
    settings.read_string(text)
    extras = {name: found.strip().splitlines() for name, found in settings['extras'].items()}
    asked = settings['project']['requirements'].strip().splitlines()
    asked += [line for name, lines in extras.items() if name not in for_the_house for line in lines]
    return asked, [line for line in extras.get('dev', []) if name_of(line) == 'nbdev']

def unbounded(requirements):
    "Requirements without a lower bound: their lowest version is the first that was ever made."
    return [r for r in requirements if '>=' not in r and '==' not in r]

def solve(lines):
    "Pins for all that some requirements need."
    python = '.'.join(map(str, sys.version_info[:2]))
    command = [sys.executable, '-m', 'uv', 'pip', 'compile', '--quiet', '--no-header', '--no-annotate',
               '--resolution', 'lowest-direct', '--python-version', python, '-']
    done = subprocess.run(command, input='\n'.join(lines), capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return done.stdout.splitlines()

def pins(solved, asked):
    "Of all pins, those of the packages that are asked for by name."
    names = {name_of(line) for line in asked}
    return [line for line in solved if re.match(r'\w', line) and name_of(line) in names]

if __name__ == '__main__':
    asked, runner = requirements((root/'settings.ini').read_text(encoding='utf-8'))
    if found := unbounded(asked): raise SystemExit(f'no lower bound in settings.ini: {", ".join(found)}')
    print(*pins(solve(asked + runner), asked), sep='\n')
