"""Run a command until it ends, or until some minutes or steps have passed; then SIGTERM, and exit code 75.

    python bench/gpu/until.py --minutes 8 -- simclr pretrain ...
"""
import argparse, signal, subprocess, sys, time
from pathlib import Path

stopped = 75        # sysexits.h: a temporary failure, try again


def last_step(folder):
    "The step of the latest checkpoint in a folder; 0 if there is none."
    return max((int(f.name.split('-')[1]) for f in Path(folder).glob('step-*.pt')), default=0)


def end(process, patience):
    "Ask for an end, which finishes a step and saves; by force after `patience` seconds."
    process.send_signal(signal.SIGTERM)
    try: return process.wait(patience)
    except subprocess.TimeoutExpired: process.kill()
    return process.wait()


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--minutes', type=float, required=True)
    ask.add_argument('--steps', type=int, default=0, help='0: as many as there is time for')
    ask.add_argument('--checkpoints', default='', help='the folder where steps show')
    ask.add_argument('--patience', type=float, default=60, help='seconds from SIGTERM to SIGKILL')
    ask.add_argument('command', nargs='+')
    a = ask.parse_args()
    def leave(*_): raise SystemExit(128 + signal.SIGTERM)
    signal.signal(signal.SIGTERM, leave)
    at, first = time.monotonic() + 60*a.minutes, last_step(a.checkpoints)
    process = subprocess.Popen(a.command)
    try:
        while process.poll() is None:
            if time.monotonic() >= at or a.steps and last_step(a.checkpoints) - first >= a.steps:
                code = end(process, a.patience)
                sys.exit(stopped if code in (-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM) else code)
            time.sleep(.05)
    finally:
        if process.poll() is None: end(process, a.patience)
    sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)


if __name__ == '__main__': main()
