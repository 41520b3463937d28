"The measurements of the input work, on files of all kinds of sizes."
import json, sys
from pathlib import Path

import pytest
from PIL import Image

import forks

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'bench'))

def printed(script, *args):
    done = forks.run([sys.executable, root/'bench'/script, *args], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

@pytest.mark.process
@pytest.mark.parametrize('args', [('--colors', 'torchvision', '--size', '32', '--cache', '50'), ('--size', '96')])
def test_the_pipeline_is_measured(args):
    said = printed('pipeline.py', '--tiny', *args)
    (slow, fast), (least, most) = said['ours_images_per_s']['ends'], said['decoding_images_per_s']['ends']
    shares = said['share_decoding']['ends']                # rounded to a hundredth
    assert said['files'] == 8 and slow/most - .01 <= shares[0] <= shares[1] <= fast/least + .01 and most > slow
    for name in ('ratio_torchvision', 'ours_images_per_s'):
        low, high = said[name]['ends']
        assert 0 < low <= said[name]['quartiles'][0] <= said[name]['median'] <= high
    if '--cache' in args: assert said['colors'] == 'torchvision' and said['ratio_of_cache']['median'] > 0
    else: assert said['colors'] == 'simclrv1' and 'ratio_of_cache' not in said

@pytest.mark.process
def test_decoders_agree_and_are_measured():
    said = printed('decoders.py', '--limit', '4', '--repeats', '2')
    assert all(row['equal'] == 4 and row['simplejpeg'] > 0 for row in said['ms'].values())
    assert .5 < said['box_of_two_crops'] < 1

def test_pictures_are_of_the_sizes_that_imagenet_has_and_have_detail(tmp_path):
    from pipeline import photographs, sample_images, sizes
    sample_images(tmp_path, 16)
    ims = [Image.open(file) for file in sorted(tmp_path.glob('*.jpg'))]
    assert [im.size for im in ims] == sizes and len(photographs()) == 6
    kilobytes = sum(file.stat().st_size for file in tmp_path.glob('*.jpg'))/16/1024
    assert 50 < kilobytes < 150
