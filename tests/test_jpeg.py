"JPEG files take a shorter way than others: to the same pixels, bit for bit, and to the same errors."
import io

import numpy as np, pytest, simplejpeg, torch
from PIL import Image

from simclr_nb.augmentations import simclr_augmentations
from simclr_nb.data.datasets import TwoCropDataset
from simclr_nb.data.sets import ImageSet
from simclr_nb.data.crops import Jpeg, decode_crops, open_for_crops
from simclr_nb.data.files import BadImage, open_lazy

coarse, fine = (Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8))
                for w, h in ((9, 7), (331, 205)))
picture = Image.blend(coarse.resize(fine.size, Image.BICUBIC), fine, .2)


def coded(im=picture, **kwargs):
    "An image as the bytes of a JPEG file."
    file = io.BytesIO()
    im.save(file, 'JPEG', **{'quality': 90} | kwargs)
    return file.getvalue()

def noted(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif

def sampled(colors, im=picture): return simplejpeg.encode_jpeg(np.asarray(im), 90, 'RGB', colors)

def segment(marker, payload): return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, 'big') + payload
def inserted(what, at=2, data=None):
    data = data or coded()
    return data[:at] + what + data[at:]
def changed(data, at, value): return data[:at] + bytes([value]) + data[at + 1:]

frame = coded().index(b'\xff\xc0')                       # where the header says what the picture is
def saved(kind, **kwargs):
    "The picture as the bytes of a file of another kind."
    file = io.BytesIO()
    picture.save(file, kind, **kwargs)
    return file.getvalue()

ordinary = {
    '4:4:4': sampled('444'), '4:2:2': sampled('422'), '4:2:0': sampled('420'), '4:1:1': sampled('411'),
    '4:4:0': sampled('440'), 'gray': coded(picture.convert('L')), 'progressive': coded(progressive=True),
    'progressive, gray': coded(picture.convert('L'), progressive=True), 'restarts': coded(restart_marker_rows=1),
    'rgb': coded(keep_rgb=True), 'poor': coded(quality=3), 'best': coded(quality=100, subsampling=0),
    'odd sides': coded(picture.crop((0, 0, 97, 61))), 'tiny': sampled('420', picture.resize((33, 17))),
    '64 pixels': coded(picture.resize((64, 64))), 'comment': coded(comment='a'*300),
    'profile': coded(icc_profile=b'p'*99), 'upright': coded(exif=noted(1)), 'no orientation': coded(exif=noted(9)),
    'trailing garbage': coded() + b'\xff\xd8garbage'*9, 'unknown segment': inserted(segment(0xE5, b'garbage')),
    'photoshop': inserted(segment(0xED, b'Photoshop 3.0\0garbage')),
}
xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
unusual = {
    'cmyk': coded(picture.convert('CMYK')), 'small': coded(picture.resize((40, 15))), 'png': saved('PNG'),
    **{f'turned {k}': coded(exif=noted(k)) for k in range(2, 9)}, 'turned, by xmp': inserted(segment(0xE1, xmp)),
    'several pictures': saved('MPO', save_all=True, append_images=[coarse.resize((99, 99))]),
    'fill bytes': inserted(b'\xff\xff'), 'short segment': inserted(segment(0xE0, b'JFIF\0')),
    'empty': b'', 'text': b'shopping list', 'only the start': coded()[:3], 'only the header': coded()[:frame + 30],
    'twelve bits': changed(coded(), frame + 4, 12), 'lossless': changed(coded(), frame + 1, 0xC3),
    'two colors': changed(coded(), frame + 9, 2), 'two frames': inserted(coded()[frame:frame + 19], frame),
    'no height': changed(changed(coded(), frame + 5, 0), frame + 6, 0),
}
damaged = {                                              # with a good header: only decoding tells
    'cut off': coded()[:-3000], 'no end': coded()[:-2], 'cut off, progressive': coded(progressive=True)[:-3000],
    'cut off, with an end': coded()[:-3000] + b'\xff\xd9', 'damaged': changed(coded(), len(coded())//2, 0xFF),
    'no tables': coded().replace(b'\xff\xc4', b'\xff\xfe'), 'too large': changed(coded(), frame + 5, 9),
}


def outcome(open_, file, boxes, size):
    "The crops that are cut out of a file, or what its error says."
    try:
        with open_(file) as im: return decode_crops(im, boxes, size)
    except BadImage as e: return str(e)

def same(a, b): return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b

def both_ways(file, width=97, height=61):
    "Whether both ways have the same outcome, for crops at all four scales and one that lies outside."
    short = min(width, height)
    cases = [((0, 0, short, short), short)] + [((0, 1, width, height), int(short/1.6/k)) for k in (1, 2, 4, 8)]
    cases += [((width//4, 0, width, height), 24), ((0, 0, 5000, 5), 8)]
    return [same(*(outcome(open_, file, [box, (0, 0, *box[2:])], size) for open_ in (open_for_crops, open_lazy)))
            for box, size in cases]


@pytest.mark.parametrize('name', ordinary)
@pytest.mark.parametrize('ending', ['jpg', 'png'])
def test_ordinary_files_give_the_pixels_that_pillow_gives(tmp_path, name, ending):
    file = tmp_path/f'picture.{ending}'                  # the name does not count
    file.write_bytes(ordinary[name])
    with open_for_crops(file) as im:
        assert isinstance(im, Jpeg)
        assert all(both_ways(file, *im.size))
    with Image.open(file) as im: whole = torch.from_numpy(np.array(im.convert('RGB'))).permute(2, 0, 1)
    side = min(whole.shape[1:])
    with open_for_crops(file) as im: crop = decode_crops(im, [(0, 0, side, side)], side)[0]
    assert torch.equal(crop, whole[:, :side, :side])

@pytest.mark.parametrize('name', [*unusual, *damaged])
def test_all_others_are_left_to_pillow(tmp_path, name):
    file = tmp_path/'picture.jpg'
    file.write_bytes((unusual | damaged)[name])
    try:
        with open_for_crops(file) as im: assert isinstance(im, Jpeg) == (name in damaged)
    except BadImage: assert name in unusual
    assert all(both_ways(file, 205, 205))

@pytest.mark.parametrize('progressive', [False, True])
def test_a_file_cut_off_anywhere_or_damaged_anywhere_has_the_same_outcome(tmp_path, progressive):
    rng, file = np.random.default_rng(0), tmp_path/'picture.jpg'
    whole = coded(picture.crop((0, 0, 97, 61)), progressive=progressive, exif=noted(1))
    kinds = [whole[:n] for n in range(0, len(whole), len(whole)//20)]
    places = [*rng.integers(2, 700, 80), *rng.integers(700, len(whole), 20)]
    kinds += [changed(whole, at, int(rng.integers(256))) for at in places]
    for data in kinds:
        file.write_bytes(data)
        assert all(both_ways(file))

def test_a_missing_file_is_the_same_error(tmp_path):
    for file in (tmp_path/'gone.jpg', tmp_path): assert all(both_ways(file))

def test_pillows_limits_hold(tmp_path, monkeypatch):
    file = tmp_path/'picture.jpg'
    file.write_bytes(coded())
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 30_000)              # an error at twice as many
    with pytest.raises(BadImage, match='decompression bomb'), open_for_crops(file): pass
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 60_000)              # a warning
    with pytest.warns(Image.DecompressionBombWarning), open_for_crops(file) as im: assert not isinstance(im, Jpeg)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    with open_for_crops(file) as im: assert isinstance(im, Jpeg)

@pytest.mark.parametrize('mode, most', [('RGB', 4), ('L', 5)])
def test_the_limit_on_memory_holds(tmp_path, monkeypatch, mode, most):
    file = tmp_path/'picture.jpg'
    file.write_bytes(coded(picture.convert(mode)))
    for pixel in (most - .01, most + .01):
        monkeypatch.setenv('SIMCLR_NB_IMAGE_MB', str(pixel*331*205/2**20))
        said = outcome(open_for_crops, file, [(0, 0, 200, 200)], 150)
        assert same(said, outcome(open_lazy, file, [(0, 0, 200, 200)], 150))
        assert torch.is_tensor(said) == (pixel > most)
        assert torch.is_tensor(outcome(open_for_crops, file, [(0, 0, 200, 200)], 60))        # at reduced size

def test_the_training_set_takes_the_short_way(tmp_path, monkeypatch):
    "Pillow does not even see an ordinary file."
    file = tmp_path/'picture.jpg'
    file.write_bytes(coded())
    dataset = TwoCropDataset(ImageSet([file]), simclr_augmentations(32))
    monkeypatch.setattr(Image, 'open', None)
    assert dataset[0, 0][0].shape == (2, 3, 32, 32)
