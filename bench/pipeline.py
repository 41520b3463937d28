"""From image files to two finished views of each: images per second, in one process and one thread.

    python bench/pipeline.py --images DIR --size 224

Ours beside lightly's SimCLRTransform (where it is installed) and torchvision's own transforms, on the same files in the
same run, and beside nothing but decoding them. Prints JSON.
Without --images, 128 pictures of the sizes that ImageNet has are cut out of the photographs that come with scikit-image
and scikit-learn, at their own resolution, mirrored at the edges, and saved as JPEGs of quality 90.
"""
import os
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = '1'
import argparse, json, re, statistics, tempfile, time, warnings
from importlib.util import find_spec
from pathlib import Path
warnings.simplefilter('ignore')

import cv2, numpy as np, torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2
from simclr_nb.augmentations import ColorDistortion, RandomBlur, keyed_rng, simclr_augmentations
from simclr_nb.data.datasets import TwoCropDataset
from simclr_nb.data.sources import load_images
from simclr_nb.data.sets import ImageSet
from simclr_nb.data.crops import decode_crops, decode_whole, open_for_crops, oriented_size
from simclr_nb.training.views import apply_cpu, apply_cv

# (width, height), pixels: the sizes of 16 photographs of ImageNet, in about the shares they have there
sizes = [(500, 375)]*6 + [(500, 333)]*3 + [(375, 500)]*2 + [(333, 500), (400, 300), (640, 480), (845, 563), (256, 320)]


def photographs():
    "Real photographs, as arrays."
    found = [load_sample_image(f'{name}.jpg') for name in ('china', 'flower')]
    if find_spec('skimage'):
        from skimage import data
        found += [getattr(data, name)() for name in ('astronaut', 'chelsea', 'coffee', 'rocket')]
    return found


def sample_images(folder, n):
    "Pictures cut out of photographs, which go on beyond their edges as in a mirror."
    photos = photographs()
    for i in range(n):
        photo, rng, (width, height) = photos[i % len(photos)], keyed_rng(0, index=i), sizes[i % len(sizes)]
        rows, columns = photo.shape[:2]
        tiled = np.pad(photo, ((0, rows), (0, columns), (0, 0)), 'symmetric')
        top, left = rng.integers(2*rows - height + 1), rng.integers(2*columns - width + 1)
        part = Image.fromarray(np.ascontiguousarray(tiled[top:top + height, left:left + width]))
        part.save(Path(folder)/f'{i:03}.jpg', quality=90)


def small(size): return size <= 32


def ours(files, augment, batch_size, device, cache=0):
    data = TwoCropDataset(ImageSet(files), augment, cache_mb=cache)
    apply = apply_cpu if device == 'cpu' else None
    def run():
        for i in range(0, len(files), batch_size):
            crops, params, *_ = zip(*[data[0, k] for k in range(i, min(i + batch_size, len(files)))])
            crops, params = torch.stack(crops).to(device), torch.from_numpy(np.stack(params)).to(device)
            views = augment.views(crops, params, apply)
        return views
    return run


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


def decoding(files):
    def run():
        for file in files:
            with open_for_crops(file) as im: decode_whole(im)
    return run


def spread(values, digits=2):
    "Median, quartiles, and the ends."
    low, high = np.quantile(values, [.25, .75])
    named = dict(median=statistics.median(values), quartiles=[low, high], ends=[min(values), max(values)])
    return {k: np.round(v, digits).tolist() for k, v in named.items()}


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
    size, crops = augment.size, TwoCropDataset(ImageSet(files), augment)[0, 0][0]
    views = [np.ascontiguousarray(c.permute(1, 2, 0).numpy()/np.float32(255)) for c in crops]
    def draw(i): return augment.draw_views((0, 0, i), 500, 375)
    def decode(i):
        with open_for_crops(files[i]) as im: return decode_whole(im)
    def decode_and_crop(i):
        with open_for_crops(files[i]) as im:
            return decode_crops(im, augment.draw_views((0, 0, i), *oriented_size(im))[0], size)
    def time_of(kind):
        transform = next((t for t in augment.transforms if isinstance(t, kind)), None)
        if transform is None: return None
        drawn = [transform.draw_params(keyed_rng(0, index=i)) for i in range(len(files))]
        def apply_to_two(i): return [apply_cv(transform, v, drawn[i]) for v in views]
        return per_image(apply_to_two, files, repeats)
    took = {f.__name__: per_image(f, files, repeats) for f in (draw, decode, decode_and_crop)}
    return dict(draw=took['draw'], decode=took['decode'], decode_draw_and_crop_two=took['decode_and_crop'],
        color_of_two=time_of(ColorDistortion), blur_of_two=time_of(RandomBlur))


def measure(files, size, batch_size, repeats, device, colors, cache):
    strength, blur = (.5, False) if small(size) else (1., True)
    augment = simclr_augmentations(size, strength, blur, implementation=colors)
    runs = dict(ours=ours(files, augment, batch_size, device))
    if cache: runs['ours_cached'] = ours(files, augment, batch_size, device, cache)
    if find_spec('lightly'): runs['lightly'] = lightlys(files, size, batch_size, device)
    runs['torchvision'] = torchvisions(files, size, batch_size, device)
    for run in runs.values():
        views = run()
        assert views.shape[1:] == (3, size, size) and views.dtype == torch.float32
    runs['decoding'] = decoding(files)
    seconds = {name: [] for name in runs}
    for _ in range(repeats):                             # in turns, so that a busy moment hits all of them
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device != 'cpu': torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    def over(a, b): return spread([x/y for x, y in zip(seconds[a], seconds[b])])
    result = {f'{name}_images_per_s': spread([len(files)/s for s in took], 1) for name, took in seconds.items()}
    result |= {f'ratio_{name}': over(name, 'ours') for name in ('lightly', 'torchvision') if name in runs}
    if cache: result['ratio_of_cache'] = over('ours', 'ours_cached')
    return result | dict(share_decoding=over('decoding', 'ours'), ms_per_image=stages(files, augment, repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', help='a folder, or the name of a set; without it, pictures are cut out')
    parser.add_argument('--size', type=int, default=224, help='side of the views; up to 32, the recipe for CIFAR-10')
    parser.add_argument('--limit', type=int, default=256, help='how many files to take')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--colors', default='simclrv1', choices=['simclrv1', 'simclrv2', 'torchvision'],
                        help='the definition of the colors in ours')
    parser.add_argument('--cache', type=float, default=0, help='megabytes; ours with decoded images in memory, too')
    parser.add_argument('--device', default='cpu', help='where the views are finished: cpu or cuda')
    parser.add_argument('--tiny', action='store_true', help='8 files, twice: for tests')
    args = parser.parse_args()
    if args.tiny: args.limit, args.repeats = 8, 2
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as tmp:
        if not args.images: sample_images(tmp, min(args.limit, 128))
        found = load_images(args.images or tmp).files
        files = found[::max(1, len(found)//args.limit)][:args.limit]
        result = measure(files, args.size, args.batch_size, args.repeats, args.device, args.colors, args.cache)
    facts = dict(images='given' if args.images else 'cut out of photographs', files=len(files), size=args.size,
        colors=args.colors, device=args.device)
    lists = re.compile(r'\[\s+([^\]]*?),\s+([^\]]*?)\s+\]')
    print(lists.sub(r'[\1, \2]', json.dumps(facts | result, indent=2)))


if __name__ == '__main__': main()
