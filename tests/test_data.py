"Hostile files and folders: each is read right, or named and left out, and nothing else suffers."
import io, json, os, subprocess, sys, tarfile, warnings, zlib
from pathlib import Path
from unittest import mock

import numpy as np, pytest, torch
from PIL import Image

from simclr_nb.augmentations import keyed_rng, simclr_augmentations
from simclr_nb.core import pixels
from simclr_nb.data.datasets import EvalDataset, TwoCropDataset, train_loader
from simclr_nb.data.files import BadImage, open_image
from simclr_nb.data.sets import ImageSet, folder_images, folder_splits, image_files, stratified_split
from simclr_nb.data.sources import source_splits, train_test_splits
from simclr_nb.operations import AutoAugment

root = Path(__file__).resolve().parents[1]
augment = simclr_augmentations(40)
smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
picture = smooth.resize((120, 90), Image.BICUBIC)
gray = picture.convert('L')
back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}        # the `Image.Transpose` that undoes each orientation


def save(file, im=picture, orientation=None, **kwargs):
    "An image file that is upright once its orientation is followed."
    if orientation is not None:
        kwargs['exif'] = Image.Exif()
        kwargs['exif'][0x112] = orientation
    im = im.transpose(back[orientation]) if orientation in back else im
    file.parent.mkdir(parents=True, exist_ok=True)
    im.save(file, **kwargs)
    return file


def warned(f, *args):
    "(what f returns, the warnings it gives)."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        return f(*args), [str(w.message) for w in seen]


def crops(file, epoch=0): return TwoCropDataset(ImageSet([file]), augment)[epoch, 0][0]


# Orientation

@pytest.mark.parametrize('orientation', [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
@pytest.mark.parametrize('ending', ['tif', 'png', 'webp', 'jpg'])
def test_crops_of_a_turned_file_are_those_of_the_upright_one(tmp_path, ending, orientation):
    kwargs = dict(lossless=True) if ending == 'webp' else {}
    upright = save(tmp_path/f'upright.{ending}', **kwargs)
    turned = save(tmp_path/f'turned.{ending}', orientation=orientation, **kwargs)
    near = 8 if ending == 'jpg' else 0                   # JPEG's blocks lie elsewhere
    pairs = [(crops(upright, epoch), crops(turned, epoch)) for epoch in range(8)]
    pairs += [tuple(EvalDataset(ImageSet([f]), 64)[0][0] for f in (upright, turned))]
    pairs += [(pixels(open_image(upright)), pixels(open_image(turned)))]
    for a, b in pairs:
        assert a.shape == b.shape and (a.int() - b.int()).abs().float().mean() <= near


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_a_large_turned_jpeg_is_decoded_at_reduced_size(tmp_path, orientation):
    large = smooth.resize((800, 600), Image.BICUBIC)
    upright = save(tmp_path/'upright.jpg', large, quality=95)
    turned = save(tmp_path/'turned.jpg', large, orientation, quality=95)
    for epoch in range(4): assert (crops(upright, epoch).int() - crops(turned, epoch).int()).abs().float().mean() < 4


def test_a_header_with_another_size_than_the_pixels(tmp_path):
    "An icon of Apple's holds several sizes, and decodes to twice the one in its header."
    file = tmp_path/'icon.icns'
    save(tmp_path/'square.png', picture.resize((64, 64)))
    Image.open(tmp_path/'square.png').save(file)
    with Image.open(file) as im: header, decoded = im.size, (im.load(), im.size)[1]
    whole = EvalDataset(ImageSet([file]), 64)[0][0]
    off = (whole.int() - pixels(open_image(file).resize((64, 64), Image.BICUBIC)).int()).abs().float().mean()
    assert off < 2, (header, decoded, off)


class Outside:
    "An augmentation whose boxes suit no picture."
    size = 8
    def draw_views(self, key, w, h): return [(0, 0, w + 1, h)]*2, np.zeros((2, 0), np.float32)

def test_whatever_fails_while_cutting_names_the_file(tmp_path):
    for name in ('odd.png', 'odd.jpg', 'odd.tif'):
        with pytest.raises(BadImage, match=name): TwoCropDataset(ImageSet([save(tmp_path/name)]), Outside())[0, 0]

def test_a_file_that_fails_while_cutting_is_left_out(tmp_path):
    images = ImageSet([save(tmp_path/f'{i}.png', orientation=1) for i in range(4)])
    dataset, real = TwoCropDataset(images, augment), augment.draw_views
    def draw(key, w, h): return ([(0, 0, w + 7, h)]*2, real(key, w, h)[1]) if key[2] == 2 else real(key, w, h)
    with mock.patch.object(augment, 'draw_views', draw): items = [dataset[0, i][-1] for i in range(4)]
    assert items[2] != 2 and [items[i] for i in (0, 1, 3)] == [0, 1, 3]
    assert [f.name for f in dataset.unreadable_files()] == ['2.png']


# Odd files

def tiff16(file, endian):
    x = (np.asarray(gray, np.uint16)*257).astype(endian + 'u2')
    Image.frombytes(f'I;16{"B" if endian == ">" else ""}', gray.size, x.tobytes()).save(file)

odd = {
    'gray.png': lambda f: gray.save(f), 'bits.png': lambda f: gray.convert('1').save(f),
    'palette.gif': lambda f: picture.quantize(64).save(f),
    'clear.gif': lambda f: picture.quantize(64).save(f, transparency=3),
    'gray alpha.png': lambda f: Image.merge('LA', (gray, gray)).save(f),
    'alpha.tif': lambda f: Image.merge('RGBA', (*picture.split(), gray)).save(f),
    'cmyk.jpg': lambda f: picture.convert('CMYK').save(f), 'cmyk.tif': lambda f: picture.convert('CMYK').save(f),
    'lab.tif': lambda f: Image.merge('LAB', picture.split()).save(f),
    'ycbcr.tif': lambda f: picture.convert('YCbCr').save(f),
    'little.tif': lambda f: tiff16(f, '<'), 'big.tif': lambda f: tiff16(f, '>'),
    'deep.png': lambda f: Image.fromarray(np.asarray(gray, np.uint16)*257).save(f),
    'float.tif': lambda f: Image.fromarray(np.asarray(gray, np.float32)/255).save(f),
    'moving.gif': lambda f: picture.save(f, save_all=True, append_images=[gray.convert('RGB')]),
    'moving.webp': lambda f: picture.save(f, save_all=True, append_images=[gray.convert('RGB')]),
    'pages.tif': lambda f: picture.save(f, save_all=True, append_images=[picture], compression='tiff_lzw'),
    'progressive.jpg': lambda f: picture.save(f, progressive=True), 'bare.bmp': lambda f: picture.save(f),
    'icon.ico': lambda f: picture.save(f), 'wavelets.jp2': lambda f: picture.save(f),
    'plain.ppm': lambda f: picture.save(f),
}

@pytest.mark.parametrize('name', odd)
def test_odd_files_are_read(tmp_path, name):
    odd[name](tmp_path/name)
    whole = pixels(open_image(tmp_path/name))
    assert crops(tmp_path/name).shape == (2, 3, 40, 40)
    if name in ('gray.png', 'little.tif', 'big.tif', 'deep.png', 'float.tif'):
        assert torch.equal(whole, pixels(gray.convert('RGB')))
    elif name not in ('gray alpha.png', 'alpha.tif', 'bits.png', 'lab.tif', 'clear.gif', 'icon.ico'):
        off = (whole.int() - pixels(picture).int()).abs().float().mean()
        assert whole.shape == (3, 90, 120) and off < (30 if 'gif' in name else 5), off


def png(width, height, idat=b''):
    def chunk(kind, payload):
        crc = zlib.crc32(kind + payload)
        return len(payload).to_bytes(4, 'big') + kind + payload + crc.to_bytes(4, 'big')
    size = width.to_bytes(4, 'big') + height.to_bytes(4, 'big')
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', size + b'\x08\x02\0\0\0') + chunk(b'IDAT', idat)

def half(im, ending, **kwargs):
    "The first half of an image file."
    file = io.BytesIO()
    im.save(file, ending, **kwargs)
    return file.getvalue()[:len(file.getvalue())//2]

broken = {
    'empty.png': b'', 'text.jpg': b'shopping list', 'bomb.png': png(60_000, 60_000), 'wide.png': png(2**31 - 1, 1),
    'nothing.png': png(100, 100), 'half.jpg': half(picture, 'JPEG'), 'half.png': half(picture, 'PNG'),
    'half.tif': half(picture, 'TIFF', compression='tiff_lzw'), 'half.gif': half(picture.quantize(64), 'GIF'),
    'half.webp': half(picture, 'WEBP'), 'drawing.svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>'}

@pytest.mark.parametrize('name', broken)
def test_broken_files_are_named_and_left_out(tmp_path, name):
    (tmp_path/name).write_bytes(broken[name])
    with pytest.raises(BadImage, match=name): open_image(tmp_path/name)
    dataset = TwoCropDataset(ImageSet([tmp_path/name, save(tmp_path/'good.png')]), augment)
    assert dataset[0, 0][-1] == 1 and [f.name for f in dataset.unreadable_files()] == [name]
    assert EvalDataset(ImageSet([tmp_path/name]), 40)[0] is None


def test_deep_gray_with_a_transparent_level_is_laid_on_white(tmp_path):
    x = np.asarray(gray, np.uint16)*257
    level = int(x[0, 0])
    Image.fromarray(x).save(tmp_path/'deep.png', transparency=level)
    got = np.asarray(open_image(tmp_path/'deep.png'))
    assert (got[x == level] == 255).all() and (got[x != level, 0] == x[x != level]//257).all()


def test_messages_of_the_decoder_go_into_the_error(tmp_path, capfd):
    whole = bytearray(save(tmp_path/'scan.tif', compression='tiff_lzw').read_bytes())
    middle = slice(len(whole)//4, len(whole)//2)
    whole[middle] = bytes(255 - b for b in whole[middle])
    (tmp_path/'scan.tif').write_bytes(whole)
    with pytest.raises(BadImage, match='lines from its decoder: 1, the first') as error: open_image(tmp_path/'scan.tif')
    assert len(str(error.value)) < 1000 and capfd.readouterr().err == ''


# Memory

def test_a_picture_that_takes_too_much_memory_is_left_out(tmp_path, monkeypatch):
    clear = save(tmp_path/'clear.png', Image.new('RGBA', (1000, 1000)))
    opaque = save(tmp_path/'opaque.png', Image.new('RGB', (1000, 1000)))
    monkeypatch.setenv('SIMCLR_NB_IMAGE_MB', '5')
    assert open_image(opaque).size == (1000, 1000)
    with pytest.raises(BadImage, match='clear.png.* take 8 MB of memory, the limit is 5 MB'): open_image(clear)
    assert TwoCropDataset(ImageSet([clear, opaque]), augment)[0, 0][-1] == 1
    monkeypatch.delenv('SIMCLR_NB_IMAGE_MB')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 900_000)              # Pillow's own limit is twice that
    with pytest.raises(BadImage, match='take 8 MB of memory, the limit is 7 MB'): open_image(clear)


def test_a_large_jpeg_counts_at_its_reduced_size(tmp_path, monkeypatch):
    file = save(tmp_path/'large.jpg', smooth.resize((1600, 1200)))
    monkeypatch.setenv('SIMCLR_NB_IMAGE_MB', '1')
    with pytest.raises(BadImage, match='the limit is 1 MB'): open_image(file)
    assert EvalDataset(ImageSet([file]), 64)[0][0].shape == (3, 64, 64)


peak = '''
import re, sys
from pathlib import Path
from simclr_nb.augmentations import Augmentation, NoCrop
from simclr_nb.data.datasets import ImageSet, TwoCropDataset
def kilobytes(key): return int(re.search(key + r':\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])
dataset = TwoCropDataset(ImageSet(sys.argv[1:]), Augmentation(64, NoCrop()))
dataset.views(0, 0)
Path('/proc/self/clear_refs').write_text('5')            # the peak is counted from here
before = kilobytes('VmRSS')
dataset.views(0, 1)
print(1024*(kilobytes('VmHWM') - before))
'''

@pytest.mark.process
@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='peak memory is read from /proc')
@pytest.mark.parametrize('mode, most', [('RGB', 8), ('RGBA', 10.5), ('I;16', 10)])
def test_a_large_picture_is_not_copied_many_times(tmp_path, mode, most):
    "Peak memory in bytes a pixel, of a picture that is cut whole, twice."
    side = 4000
    Image.new(mode, (side, side)).save(tmp_path/'large.png', compress_level=1)
    command = [sys.executable, '-c', peak, str(save(tmp_path/'small.png')), str(tmp_path/'large.png')]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout)/side**2 < most, f'{int(done.stdout)/side**2:.1f} bytes a pixel'


# Names

latin = os.fsdecode('caf\u00e9'.encode('latin-1'))

def test_names_that_are_not_utf_8(tmp_path):
    try: save(tmp_path/latin/f'{latin}.png')
    except OSError: pytest.skip('this file system takes UTF-8 only')
    save(tmp_path/'tea'/'1.png')
    (tmp_path/'tea'/f'{latin}.png').write_text('no picture')
    images = folder_images(tmp_path)
    assert [c.encode() for c in images.classes] == [rb'caf\udce9', b'tea'] and images.labels.tolist() == [0, 1, 1]
    with pytest.raises(BadImage) as error: open_image(tmp_path/'tea'/f'{latin}.png')
    assert rb'caf\udce9.png' in str(error.value).encode()
    assert folder_images(tmp_path, images.classes).labels.tolist() == [0, 1, 1]
    dataset = TwoCropDataset(images.subset([2, 2]), augment)
    with pytest.raises(BadImage) as error: dataset[0, 0]
    str(error.value).encode()

def test_errors_about_a_folder_can_be_printed(tmp_path):
    for f in (folder_images, folder_splits):
        with pytest.raises(FileNotFoundError) as error: f(tmp_path/latin)
        str(error.value).encode()


# Folders

def test_a_picture_counts_once_however_many_links_lead_to_it(tmp_path):
    for i in range(5): save(tmp_path/'set'/'a'/f'{i}.png')
    (tmp_path/'set'/'loop').symlink_to(tmp_path/'set')
    (tmp_path/'set'/'a'/'up').symlink_to('..')
    (tmp_path/'set'/'a'/'beyond').symlink_to(tmp_path)
    (tmp_path/'set'/'a'/'self.png').symlink_to('self.png')
    (tmp_path/'set'/'twin').symlink_to('a')
    (tmp_path/'set'/'0 again.png').symlink_to('a/0.png')
    files, said = warned(image_files, tmp_path/'set')
    assert [f.name for f in files] == ['0.png', '1.png', '2.png', '3.png', '4.png', 'self.png']
    assert len(said) == 1 and '5 (' in said[0] and 'twin' in said[0] and '0 again.png' in said[0]

def test_links_to_other_places_are_followed(tmp_path):
    for i in range(3): save(tmp_path/'elsewhere'/f'{i}.png')
    (tmp_path/'set'/'b').mkdir(parents=True)
    (tmp_path/'set'/'a').symlink_to(tmp_path/'elsewhere')
    (tmp_path/'set'/'b'/'two.png').symlink_to(tmp_path/'elsewhere'/'2.png')
    (tmp_path/'set'/'b'/'gone.png').symlink_to(tmp_path/'nowhere.png')
    (tmp_path/'link').symlink_to(tmp_path/'set')
    for folder in (tmp_path/'set', tmp_path/'link'):
        files, said = warned(image_files, folder)
        assert [str(f.relative_to(folder)) for f in files] == ['a/0.png', 'a/1.png', 'b/gone.png', 'b/two.png'], files
        assert len(said) == 1 and '2.png' in said[0]

def test_two_folders_that_hold_links_to_each_other(tmp_path):
    save(tmp_path/'set'/'0.png'), save(tmp_path/'x'/'1.png'), save(tmp_path/'y'/'2.png')
    (tmp_path/'set'/'to x').symlink_to(tmp_path/'x')
    (tmp_path/'x'/'to y').symlink_to(tmp_path/'y')
    (tmp_path/'y'/'to x').symlink_to(tmp_path/'x')
    assert [f.name for f in warned(image_files, tmp_path/'set')[0]] == ['0.png', '1.png', '2.png']

def test_folders_that_cannot_be_opened_are_named(tmp_path):
    for name in ('a/1.png', 'b/2.png'): save(tmp_path/name)
    real = os.scandir
    def scandir(path):
        if Path(path).name == 'b': raise PermissionError(13, 'Permission denied', str(path))
        return real(path)
    with mock.patch('os.scandir', scandir): files, said = warned(image_files, tmp_path)
    assert [f.name for f in files] == ['1.png'] and len(said) == 1 and str(tmp_path/'b') in said[0]

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes here')
def test_a_pipe_is_no_picture(tmp_path):
    "Opening it would wait forever."
    save(tmp_path/'1.png')
    os.mkfifo(tmp_path/'pipe.png')
    files, said = warned(image_files, tmp_path)
    assert [f.name for f in files] == ['1.png'] and 'pipe.png' in said[0]

def test_the_order_of_files_is_that_of_their_paths(tmp_path):
    for name in ('a/z.png', 'a-b/1.png', 'a.b/1.png', 'b.png', 'a/b/c.png', 'A.png'): save(tmp_path/name)
    assert image_files(tmp_path) == sorted(tmp_path.rglob('*.png'))


# Labels and parts

def pets(folder, *names):
    for name in names: save(folder/name)
    return folder

def test_a_stray_image_at_the_top_is_left_out_with_a_word(tmp_path):
    folder = pets(tmp_path, 'cat/1.png', 'cat/2.png', 'dog/1.png', 'dog/2.png', 'preview.png')
    images, said = warned(folder_images, folder)
    assert images.labels.tolist() == [0, 0, 1, 1] and images.classes == ['cat', 'dog'] and len(images) == 4
    assert len(said) == 1 and 'preview.png' in said[0] and '1 of 5' in said[0]

def test_a_folder_with_as_many_images_at_the_top_keeps_them_all(tmp_path):
    folder = pets(tmp_path, 'trip/1.png', 'trip/2.png', '1.png', '2.png')
    images, said = warned(folder_images, folder)
    assert images.labels is None and len(images) == 4 and 'no labels' in said[0]
    assert warned(folder_images, folder/'trip')[1] == []

def test_a_labeled_val_goes_before_an_unlabeled_test(tmp_path):
    folder = pets(tmp_path, 'train/cat/1.png', 'train/dog/1.png', 'val/cat/2.png', 'val/dog/2.png', 'test/3.png')
    train, test = folder_splits(folder)
    assert test.labels.tolist() == [0, 1] and test.files[0].parts[-3] == 'val'
    pets(folder, 'test/cat/1.png', 'test/dog/1.png', 'test/dog/2.png')
    assert warned(folder_splits, folder)[0][1].files[0].parts[-3:-1] == ('test', 'cat')

def test_an_empty_test_goes_after_a_labeled_val(tmp_path):
    folder = pets(tmp_path, 'train/cat/1.png', 'val/cat/2.png')
    (folder/'test').mkdir()
    assert folder_splits(folder)[1].labels.tolist() == [0]

@pytest.mark.parametrize('train, test', [('train', 'validation'), ('train', 'val'), ('Train', 'Test'),
    ('TRAINING', 'testing'), ('train', 'valid'),
    ('training_set', 'test_set'), ('train2017', 'val2017'), ('Train', 'dev'), ('train', 'eval')])
def test_parts_go_by_many_names(tmp_path, train, test):
    "Or the folder would be one set whose classes are its parts: is this picture from `train`?"
    folder = pets(tmp_path, f'{train}/cat/1.png', f'{train}/dog/2.png', f'{test}/cat/3.png', f'{test}/dog/4.png')
    for parts in (folder_splits(folder), source_splits(folder), train_test_splits(folder)):
        assert [[f.name for f in part.files] for part in parts] == [['1.png', '2.png'], ['3.png', '4.png']]
        assert all(part.classes == ['cat', 'dog'] and part.labels.tolist() == [0, 1] for part in parts)

def test_classes_are_no_parts(tmp_path):
    "A train among vehicles has no test beside it."
    for names in (('train', 'bus', 'car'), ('train_station', 'test_tube'), ('val', 'test')):
        folder = pets(tmp_path/names[0], *(f'{name}/1.png' for name in names))
        everything, test = source_splits(folder)
        assert test is None and everything.classes == sorted(names)

def test_two_folders_to_train_on_are_an_error(tmp_path):
    folder = pets(tmp_path, 'train/1.png', 'training/2.png', 'test/3.png')
    with pytest.raises(ValueError, match='more than one training part: train, training'): folder_splits(folder)

def test_pictures_of_the_web_are_pictures(tmp_path):
    "Python's own list of endings knows no WebP."
    for name in ('a.webp', 'b.WEBP', 'c.jfif', 'd.jp2', 'e.JPG'):
        kind = dict(webp='WEBP', jp2='JPEG2000').get(name[2:].lower(), 'JPEG')
        Image.new('RGB', (20, 20)).save(tmp_path/name, kind)
    assert [f.name for f in folder_images(tmp_path).files] == ['a.webp', 'b.WEBP', 'c.jfif', 'd.jp2', 'e.JPG']
    assert all(image.size == (20, 20) for image in folder_images(tmp_path))

def test_parts_of_several_labels_per_image():
    labels = np.random.default_rng(0).integers(0, 2, (40, 5))
    images = ImageSet([f'{i}.png' for i in range(40)], labels)
    train, test = stratified_split(images)
    assert len(test) == 10 and sorted(train.files + test.files) == sorted(images.files)
    for part in (train, test):
        assert (part.labels == labels[[int(f.stem) for f in part.files]]).all()

def test_parts_where_a_class_has_no_image():
    images = ImageSet([f'{i}.png' for i in range(16)], [0, 2]*8, ['a', 'b', 'c'])
    assert stratified_split(images)[1].labels.tolist().count(2) == 2

class Named(str):
    "A class name that counts how often it is compared."
    compared = 0
    __hash__ = str.__hash__
    def __eq__(self, other):
        Named.compared += 1
        return str.__eq__(self, other)

def test_classes_are_looked_up_not_searched(tmp_path):
    for c in range(60): (tmp_path/f'{c:02}').mkdir(), (tmp_path/f'{c:02}'/'x.png').touch()
    Named.compared = 0
    assert folder_images(tmp_path, [Named(f'{c:02}') for c in range(60)]).labels.tolist() == list(range(60))
    assert Named.compared < 60*10

def test_paths_are_not_copied():
    files = [Path(f'{i}.png') for i in range(3)]
    assert all(a is b for a, b in zip(ImageSet(files).subset([0, 1, 2]).files, files))


# Many unreadable files, and files that can be read at times

def count_reads(dataset):
    "The indices that are read from now on."
    reads, views = [], dataset.views
    dataset.views = lambda epoch, i: (reads.append(i), views(epoch, i))[1]
    return reads

def text_files(folder, n):
    for i in range(n): (folder/f'{i:04}.png').write_text('no picture')
    return [folder/f'{i:04}.png' for i in range(n)]

def test_a_folder_where_nothing_can_be_read_is_given_up_soon(tmp_path):
    dataset = TwoCropDataset(ImageSet(text_files(tmp_path, 2000)), augment)
    reads = count_reads(dataset)
    said = r'of 2000 in the set, can be read: .*\.png, .*and \d+ more\. The first: cannot read .*0007'
    with pytest.raises(BadImage, match=said): dataset[0, 7]
    assert len(reads) <= 257

def test_unreadable_files_do_not_all_give_way_to_one_image(tmp_path):
    good = [save(tmp_path/'good'/f'{i}.png') for i in range(10)]
    dataset = TwoCropDataset(ImageSet(text_files(tmp_path, 200) + good), augment)
    reads = count_reads(dataset)
    stand_ins = [dataset[0, i][-1] for i in range(200)]
    assert min(stand_ins) >= 200 and len(set(stand_ins)) == 10
    assert len(reads) <= 200 + 200 + 200                 # each bad file once more than needed at most

def test_stand_ins_depend_on_the_key_alone(tmp_path):
    images = ImageSet(text_files(tmp_path, 20) + [save(tmp_path/'good'/f'{i}.png') for i in range(20)])
    first, again = TwoCropDataset(images, augment), TwoCropDataset(images, augment)
    again.unreadable[:20] = True                         # known from before: a resumed run
    for i in range(20): assert first[1, i][-1] == again[1, i][-1] and torch.equal(first[1, i][0], again[1, i][0])
    one, two = ([b[-1].tolist() for b in train_loader(images, augment, 8, num_workers=n)] for n in (0, 2))
    assert one == two

def test_a_file_that_can_be_read_again_is_no_longer_unreadable(tmp_path):
    images = ImageSet([save(tmp_path/f'{i}.png') for i in range(3)])
    dataset = TwoCropDataset(images, augment)
    whole = images.files[1].read_bytes()
    images.files[1].write_text('the network drive is away')
    assert dataset[0, 1][-1] != 1 and dataset.unreadable_files() == [images.files[1]]
    images.files[1].write_bytes(whole)
    assert dataset[1, 1][-1] == 1 and dataset.unreadable_files() == []


# Other generators

def test_autoaugment_leaves_the_generators_of_gpus_alone():
    transform, x = AutoAugment(), torch.rand(2, 3, 16, 16)
    params = torch.tensor([transform.draw_params(keyed_rng(0, index=i)) for i in range(2)], dtype=torch.float32)
    before = torch.get_rng_state()
    with mock.patch('torch.cuda.manual_seed_all') as reseed: first = transform.apply(x, params)
    assert not reseed.called and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(transform.apply(x, params), first)


@pytest.mark.process
def test_pictures_of_phones(tmp_path):
    "HEIC, from a folder and from a tar file, upright; where its package is missing the error says so."
    heif = pytest.importorskip('pillow_heif')
    exif = Image.Exif()
    exif[0x112] = 6
    heif.from_pillow(picture.transpose(back[6])).save(tmp_path/'a.HEIC', quality=-1, exif=exif.tobytes())
    with tarfile.open(tmp_path/'shard.tar', 'w') as tar: tar.add(tmp_path/'a.HEIC', 'a.HEIC')
    code = """
import json, sys
from pathlib import Path
import numpy as np
from simclr_nb.data.sets import folder_images
from simclr_nb.data.files import BadImage
from simclr_nb.data.stores import tar_images
folder = Path(sys.argv[1])
if sys.argv[2] == 'without': sys.modules['pillow_heif'] = None
try: print(json.dumps([np.asarray(s[0]).tolist() for s in (folder_images(folder), tar_images([folder/'shard.tar']))]))
except BadImage as e: print(e)
"""
    def said(how):
        return subprocess.run([sys.executable, '-c', code, tmp_path, how], capture_output=True, text=True).stdout
    assert 'a.HEIC' in said('without') and "pip install 'simclr_nb[heic]'" in said('without')
    for got in np.array(json.loads(said("with"))):
        assert got.shape == (90, 120, 3) and np.abs(got - np.asarray(picture, int)).mean() < 6             # it is lossy
