"""Where models come from.

Files of :func:`normfuse.save` and of training scripts, directories of Hugging Face transformers, models that timm and
torchvision build by name.

None of these libraries is imported before such a model is asked for, and nothing is ever fetched.
"""

from normfuse.sources.loading import load

__all__ = ["load"]
