__version__ = "0.2.0"

import warnings as _warnings

# What fastai and timm say when they are imported is for their authors, and not for who imports us.
_warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')
_warnings.filterwarnings('ignore', 'IProgress not found')
_warnings.filterwarnings('ignore', category=DeprecationWarning, module='fastai')
