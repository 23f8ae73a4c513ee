from setuptools import setup

# The only place for version pins; dev/setup_env.py reads them from here. Two
# stacks share their import names, so neither is a hard requirement. Each mmcv
# has to be built with torch in sight (--no-build-isolation): otherwise pip
# leaves out its compiled ops in silence.
EXTRAS = {
    'onedl': [
        'torch==2.13.0',
        'torchvision==0.28.0',
        'numpy<2.3',  # by way of imaug, which caps opencv
        'onedl-mmengine==0.10.12',
        'onedl-mmcv==2.3.6',
        'onedl-mmdetection==3.5.1',
        'onedl-mmsegmentation==1.4.2',
        'onedl-mmpretrain==1.3.6',
        'safetensors==0.8.0',
        'ftfy',
        'regex',
    ],
    'openmmlab': [
        'torch==2.13.0',
        'torchvision==0.28.0',
        'numpy<2.3',
        'setuptools<81',  # mmcv and mmengine import its pkg_resources
        'mmengine==0.10.7',
        'mmcv==2.1.0',
        'mmdet==3.3.0',
        'mmsegmentation==1.2.2',
        'mmpretrain==1.2.0',
        'safetensors==0.8.0',
        'ftfy',
        'regex',
    ],
    'tests': [
        'hypothesis==6.170.15',
        'import-linter==2.17',
        'onnx==1.23.2',
        'onnxruntime==1.23.2',
        'onnxscript==0.7.2',
        'pytest==9.2.0',
        'pytest-xdist==3.8.0',
        'ruff==0.17.6',
        # that of the torch above for CUDA; without a GPU it interprets
        'triton==3.7.1',
    ],
}


# All else is in pyproject.toml.
setup(extras_require=EXTRAS)
