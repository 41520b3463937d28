"Runs a notebook's cells: `python tests/notebooks.py FILE FLAG…` is `nbdev-test FILE --flags 'FLAG…'`."
import sys
from functools import partial
from pathlib import Path

from nbdev import test
from nbdev.config import get_config
from nbdev.test import nb_test_cells, nbdev_test

test.CaptureShell = partial(test.CaptureShell, mpl_format='png')    # nobody sees these figures: half the resolution


def main(file, *flags):
    nbdev_test.__wrapped__(file, flags=' '.join(flags))
    has_code = '"code"' in Path(file).read_text(encoding='utf-8')
    if has_code and not nb_test_cells(file, get_config(Path(file).parent).tst_flags, flags):
        sys.exit('none of its code cells is run')


if __name__ == '__main__': main(*sys.argv[1:])
