"""Runs findings/*.sh, one after the other, and says how each ended; `make findings` does the same.

A finding is a script that shows, with pinned versions, where another library surprised us; it ends with 0 where it
still sees what it describes.
Names choose some of them: `python tools/findings.py temperature colors`.
"""
import os, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def scripts(folder, names=()):
    "All of them in order of their names, or the ones that are named; an unknown name is an error."
    found = {path.stem: path for path in sorted((folder/'findings').glob('*.sh'))}
    if unknown := [name for name in names if name not in found]:
        raise SystemExit(f'no finding is called {", ".join(unknown)}; there are: {", ".join(found) or "none"}')
    return [path for name, path in found.items() if not names or name in names]

def run(script, folder):
    "(exit code, seconds) of one; what it prints is seen while it runs. `python` and `simclr` are this environment's."
    env = os.environ | dict(PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    start = time.perf_counter()
    code = subprocess.run(['bash', script], cwd=folder, env=env).returncode
    return code, time.perf_counter() - start

def main(names, folder=root):
    "Run them; the number of those that failed."
    rows = []
    for script in scripts(folder, names):
        print(f'== {script.stem}', flush=True)
        rows.append((script.stem, *run(script, folder)))
    print()
    for name, code, seconds in rows: print(f'{"FAIL" if code else "ok  "} {name} ({seconds:.0f} s)')
    failed = sum(code != 0 for _, code, _ in rows)
    print(f'{len(rows) - failed} findings hold, {failed} do not')
    return failed

if __name__ == '__main__': sys.exit(bool(main(sys.argv[1:])))
