from mmmilan.teachers.base import Teacher, Tower
from mmmilan.teachers.by_name import build_teacher, teacher_config
from mmmilan.teachers.cached import CachedTargets, CachedTeacher
from mmmilan.teachers.open_clip import OpenCLIPTeacher
from mmmilan.teachers.registers import find_register_neurons
from mmmilan.teachers.timm import TimmTeacher

__all__ = [
    'CachedTargets',
    'CachedTeacher',
    'OpenCLIPTeacher',
    'Teacher',
    'TimmTeacher',
    'Tower',
    'build_teacher',
    'find_register_neurons',
    'teacher_config',
]
