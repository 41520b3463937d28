"""Milliseconds that decoding a JPEG takes, whole and at reduced size: Pillow, OpenCV and simplejpeg on the same files.

    python bench/decoders.py --images DIR

Prints JSON. At an eighth of the size a decoder unpacks all numbers of the file, and makes next to no pixels of them:
that time cannot be saved by decoding a part of a picture. `box_of_two_crops` is the share of a picture that lies in the
rectangle around both crops of the paper's recipe; only the pixels beyond it can be saved.
"""
import os
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = '1'
import argparse, io, json, statistics, tempfile, time

import cv2, numpy as np, simplejpeg
from PIL import Image
from pipeline import sample_images
from simclr_nb.augmentations import simclr_augmentations
from simclr_nb.data.sources import load_images

reduced = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4,
           8: cv2.IMREAD_REDUCED_COLOR_8}

def by_pillow(data, k):
    im = Image.open(io.BytesIO(data))
    if k > 1: im.draft(None, (im.width//k, im.height//k))
    return np.asarray(im.convert('RGB'))

def by_opencv(data, k):
    return cv2.imdecode(np.frombuffer(data, np.uint8), reduced[k])[..., ::-1]

def by_simplejpeg(data, k):
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return simplejpeg.decode_jpeg(data, min_height=-(-height//k), min_width=-(-width//k))

def around_both(size, key):
    "The share of a picture in the rectangle around two crops."
    boxes, _ = simclr_augmentations(224).draw_views(key, *size)
    left, top, right, bottom = np.array(boxes).T
    return (right.max() - left.min())*(bottom.max() - top.min())/(size[0]*size[1])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', help='a folder of JPEG files; without it, pictures are cut out of photographs')
    parser.add_argument('--limit', type=int, default=256)
    parser.add_argument('--repeats', type=int, default=7)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as tmp:
        if not args.images: sample_images(tmp, min(args.limit, 128))
        data = [file.read_bytes() for file in load_images(args.images or tmp).files[:args.limit]]
    decoders, result = (by_pillow, by_opencv, by_simplejpeg), {}
    for k in reduced:
        took = {f: [] for f in decoders}
        for _ in range(args.repeats):
            for f in decoders:
                start = time.perf_counter()
                for d in data: f(d, k)
                took[f].append((time.perf_counter() - start)/len(data)*1e3)
        result[f'1/{k}'] = {f.__name__[3:]: round(statistics.median(t), 2) for f, t in took.items()}
        result[f'1/{k}']['equal'] = sum(all(np.array_equal(by_pillow(d, k), f(d, k)) for f in decoders) for d in data)
    shapes = [simplejpeg.decode_jpeg_header(d)[1::-1] for d in data]
    share = np.mean([around_both(size, (0, epoch, i)) for i, size in enumerate(shapes) for epoch in range(5)])
    print(json.dumps(dict(files=len(data), ms=result, box_of_two_crops=round(float(share), 2)), indent=2))

if __name__ == '__main__': main()
