"""From JPEG files to two finished views of each: images per second, in one process and one thread.

    python bench/pipeline.py --images DIR --size 224

Ours beside lightly's SimCLRTransform (where it is installed) and torchvision's own transforms, on the same files in the
same run. Prints JSON.
Without --images, 128 pictures of 500 x 375 pixels are cut out of scikit-learn's two photographs.
"""
import os
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = '1'
import argparse, json, statistics, tempfile, time, warnings
from importlib.util import find_spec
from pathlib import Path
warnings.simplefilter('ignore')

import cv2, numpy as np, torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2
from simclr_nb.augmentations import ColorDistortion, RandomBlur, keyed_rng, make_views, simclr_augmentations
from simclr_nb.core import pixels
from simclr_nb.data import ImageSet, TwoCropDataset, decode_crops, open_image, open_lazy
from simclr_nb.operations import apply_cpu, apply_cv


def sample_images(folder, n=128, size=(500, 375)):
    "Pictures of ordinary ImageNet size."
    photos = [Image.fromarray(load_sample_image(f'{name}.jpg')) for name in ('china', 'flower')]
    for i in range(n):
        im, rng = photos[i % 2], keyed_rng(0, index=i)
        w = rng.uniform(.6, .85)*im.width
        h = w*size[1]/size[0]
        left, top = rng.random(2)*(im.width - w, im.height - h)
        im.resize(size, Image.BICUBIC, box=(left, top, left + w, top + h)).save(Path(folder)/f'{i:03}.jpg', quality=92)
    return folder


def small(size): return size <= 32


def ours(files, size, batch_size, device):
    augment = simclr_augmentations(size, strength=.5 if small(size) else 1., blur=not small(size))
    data = TwoCropDataset(ImageSet(files), augment, seed=0)
    apply = apply_cpu if device == 'cpu' else None
    def run():
        for i in range(0, len(files), batch_size):
            crops, params, *_ = zip(*[data[0, k] for k in range(i, min(i + batch_size, len(files)))])
            crops, params = torch.stack(crops).to(device), torch.from_numpy(np.stack(params)).to(device)
            views = make_views(augment, crops, params, apply)
        return views
    return run, augment


def lightlys(files, size, batch_size, device):
    from lightly.transforms import SimCLRTransform
    transform = SimCLRTransform(input_size=size, **(dict(cj_strength=.5, gaussian_blur=0.) if small(size) else {}))
    def run():
        for i in range(0, len(files), batch_size):
            pairs = [transform(Image.open(f).convert('RGB')) for f in files[i:i + batch_size]]
            views = torch.stack([v for pair in zip(*pairs) for v in pair]).to(device)
        return views
    return run


def torchvisions(files, size, batch_size, device):
    s = .5 if small(size) else 1.
    blur = [] if small(size) else [v2.RandomApply([v2.GaussianBlur(2*(size//20) + 1, (.1, 2.))], p=.5)]
    jitter = v2.RandomApply([v2.ColorJitter(.8*s, .8*s, .8*s, .2*s)], p=.8)
    transform = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(.2),
        *blur, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    def run():
        for i in range(0, len(files), batch_size):
            ims = [Image.open(f).convert('RGB') for f in files[i:i + batch_size]]
            views = torch.stack([transform(im) for _ in range(2) for im in ims]).to(device)
        return views
    return run


def per_image(f, files, repeats):
    "Median milliseconds of f for one file."
    f(0)
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(len(files)): f(i)
        took.append((time.perf_counter() - start)/len(files)*1e3)
    return round(statistics.median(took), 3)


def stages(files, augment, repeats):
    "Milliseconds per image of each stage alone: two views where the stage works on views."
    size, crops = augment.size, TwoCropDataset(ImageSet(files), augment, seed=0)[0, 0][0]
    views = [np.ascontiguousarray(c.permute(1, 2, 0).numpy()/np.float32(255)) for c in crops]
    def draw(i): return augment.draw_views((0, 0, i), 500, 375)
    def decode(i): return pixels(open_image(files[i]))
    def decode_and_crop(i):
        with open_lazy(files[i]) as im: return decode_crops(im, augment.draw_views((0, 0, i), *im.size)[0], size)
    def time_of(kind):
        transform = next((t for t in augment.transforms if isinstance(t, kind)), None)
        if transform is None: return None
        drawn = [transform.draw_params(keyed_rng(0, index=i)) for i in range(len(files))]
        def apply_to_two(i): return [apply_cv(transform, v, drawn[i]) for v in views]
        return per_image(apply_to_two, files, repeats)
    took = {f.__name__: per_image(f, files, repeats) for f in (draw, decode, decode_and_crop)}
    return dict(draw=took['draw'], decode=took['decode'], decode_draw_and_crop_two=took['decode_and_crop'],
        color_of_two=time_of(ColorDistortion), blur_of_two=time_of(RandomBlur))


def measure(files, size, batch_size, repeats, device):
    mine, augment = ours(files, size, batch_size, device)
    runs = dict(ours=mine)
    if find_spec('lightly'): runs['lightly'] = lightlys(files, size, batch_size, device)
    runs['torchvision'] = torchvisions(files, size, batch_size, device)
    rates = {name: [] for name in runs}
    for run in runs.values():
        views = run()
        assert views.shape[1:] == (3, size, size) and views.dtype == torch.float32
    for _ in range(repeats):                             # in turns, so that a busy moment hits all of them
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device != 'cpu': torch.cuda.synchronize()
            rates[name].append(len(files)/(time.perf_counter() - start))
    result = {name: round(statistics.median(r), 1) for name, r in rates.items()}
    for name in [name for name in runs if name != 'ours']:
        result[f'ratio_{name}'] = round(statistics.median(a/b for a, b in zip(rates['ours'], rates[name])), 2)
    return result | dict(ms_per_image=stages(files, augment, repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', help='a folder of JPEG files; without it, pictures are made')
    parser.add_argument('--size', type=int, default=224, help='side of the views; up to 32, the recipe for CIFAR-10')
    parser.add_argument('--limit', type=int, default=256, help='how many files to take')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--device', default='cpu', help='where the views are finished: cpu or cuda')
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(args.images or sample_images(tmp))
        found = sorted(f for f in folder.rglob('*') if f.suffix.lower() in ('.jpg', '.jpeg'))
        if not found: parser.error(f'no JPEG files in {args.images}')
        files = found[::max(1, len(found)//args.limit)][:args.limit]
        result = measure(files, args.size, args.batch_size, args.repeats, args.device)
    print(json.dumps(dict(size=args.size, files=len(files), device=args.device) | result, indent=2))


if __name__ == '__main__': main()
