"""Writes TensorFlow checkpoints, from the format's description: doc/table_format.md of LevelDB, and the comments of
TensorFlow's tensor_bundle.proto and tensor_bundle.h. For tests; it shares no line with the reader in
simclr_nb.weights.bundle."""
import struct
from pathlib import Path

import numpy as np

DTYPES = {'float32': 1, 'float64': 2, 'int32': 3, 'int64': 9, 'float16': 19}
MAGIC = 0xdb4775248b80fb57


def _make_table():
    for n in range(256):
        for _ in range(8): n = n >> 1 ^ (0x82f63b78 if n & 1 else 0)
        yield n

_TABLE = list(_make_table())

def crc32c(data):
    "The CRC of Castagnoli, a byte at a time."
    crc = 0xffffffff
    for byte in data: crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xffffffff

def masked(crc): return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff

def varint(n):
    out = b''
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])

def field(number, value):
    "A field of a protocol buffer; zeros are left out, as proto3 does."
    if isinstance(value, bytes): return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b''


def _shared(a, b):
    "How many bytes two keys begin with together."
    n = min(len(a), len(b))
    differ = int.from_bytes(a[:n], 'big') ^ int.from_bytes(b[:n], 'big')
    return n - (differ.bit_length() + 7)//8

def block(entries, interval):
    "Keys lose what they share with the key before, except every interval-th."
    out, restarts, last = b'', [], b''
    for i, (key, value) in enumerate(entries):
        if i % interval == 0:
            restarts.append(len(out))
            last = b''
        shared = _shared(key, last)
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f'<{len(restarts) + 1}I', *restarts, len(restarts))

def _successor(key):
    "A short key that is not before this one."
    for i, byte in enumerate(key):
        if byte != 255: return key[:i] + bytes([byte + 1])
    return key

def table(entries, block_size=262144, interval=16):
    "The whole file from sorted (key, value) pairs."
    out, handles, part = b'', [], []
    def add(data):
        nonlocal out
        handle = varint(len(out)) + varint(len(data))
        out += data + b'\0' + struct.pack('<I', masked(crc32c(data + b'\0')))
        return handle
    for i, pair in enumerate(entries):
        part.append(pair)
        at_end = i == len(entries) - 1
        if at_end or len(block(part, interval)) >= block_size:
            name = _successor(pair[0]) if at_end else pair[0]
            handles.append((name, add(block(part, interval))))
            part = []
    footer = add(block([], 1)) + add(block(handles, 1))
    return out + footer.ljust(40, b'\0') + struct.pack('<Q', MAGIC)

def header(shards=1, big_endian=0, min_consumer=0):
    return field(1, shards) + field(2, big_endian) + field(3, field(1, 1) + field(2, min_consumer))

def entry(dtype, shape, shard, offset, size, crc):
    dims = b''.join(field(2, field(1, d)) for d in shape)
    facts = field(1, dtype) + field(2, dims) + field(3, shard) + field(4, offset) + field(5, size)
    return facts + b'\x35' + struct.pack('<I', crc)

def write_bundle(prefix, tensors, shards=1, block_size=262144, head=None, crc=crc32c):
    "prefix.index and prefix.data-?????-of-?????, with the tensors (name to array) in the order of their names."
    data, entries = [b'']*shards, [(b'', head or header(shards))]
    for i, name in enumerate(sorted(tensors)):
        a, shard = np.asarray(tensors[name]), i % shards
        raw, offset = a.tobytes(), len(data[shard])
        value = entry(DTYPES[a.dtype.name], a.shape, shard, offset, len(raw), masked(crc(raw)))
        entries.append((name.encode(), value))
        data[shard] += raw
    for i, raw in enumerate(data): Path(f'{prefix}.data-{i:05d}-of-{shards:05d}').write_bytes(raw)
    Path(f'{prefix}.index').write_bytes(table(entries, block_size))
    return Path(prefix)


def official_tensors(depth=18, width=.125, stem=3, head=(None, 16), classes=10, seed=0):
    """Random tensors with the names and shapes of the official network, counted here from the paper's table of layers:
    blocks of 3 × 3, 3 × 3 (18, 34) or 1 × 1, 3 × 3, 1 × 1 (50 and more), shortcut first. `head`: outputs of its
    layers; None is d."""
    rng, out, n = np.random.default_rng(seed), {}, 0
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    def bn(scope, c, beta=True):
        new = dict(gamma=rng.uniform(.5, 1.5, c), moving_mean=rng.normal(0, .1, c),
                   moving_variance=rng.uniform(.5, 1.5, c))
        if beta: new['beta'] = rng.normal(0, .1, c)
        out.update({f'{scope}/{k}': v.astype('float32') for k, v in new.items()})
    def conv(k, i, o):
        nonlocal n
        number = f'_{n}' if n else ''
        out[f'base_model/conv2d{number}/kernel'] = rng.normal(0, (i*k*k)**-.5, (k, k, i, o)).astype('float32')
        bn(f'base_model/batch_normalization{number}', o)
        n += 1
    c = int(64*width)
    conv(stem, 3, c)
    d = c
    for stage, repeat in enumerate(blocks):
        inside = c*2**stage
        wide = inside*(1 if depth < 50 else 4)
        for b in range(repeat):
            if b == 0: conv(1, d, wide)
            if depth < 50: layers = (3, d, inside), (3, inside, inside)
            else: layers = (1, d, inside), (3, inside, inside), (1, inside, wide)
            for layer in layers: conv(*layer)
            d = wide
    before = d
    for i, o in enumerate(head):
        o = o or d
        out[f'head_contrastive/nl_{i}/dense/kernel'] = rng.normal(0, before**-.5, (before, o)).astype('float32')
        bn(f'head_contrastive/nl_{i}/batch_normalization', o, beta=i < len(head) - 1)
        before = o
    if classes:
        out['head_supervised/linear_layer/dense/kernel'] = rng.normal(0, .1, (d, classes)).astype('float32')
        out['head_supervised/linear_layer/dense/bias'] = rng.normal(0, .1, classes).astype('float32')
    out['global_step'] = np.array(12345, dtype='int64')
    return out
