from .contmix import contmix

__all__ = ['contmix']
