from mmmilan.models.teachers.base import Teacher, Tower
from mmmilan.models.teachers.by_name import build_teacher, teacher_config
from mmmilan.models.teachers.cached import CachedTeacher
from mmmilan.models.teachers.open_clip import OpenCLIPTeacher
from mmmilan.models.teachers.registers import find_register_neurons
from mmmilan.models.teachers.timm import TimmTeacher

__all__ = [
    'CachedTeacher',
    'OpenCLIPTeacher',
    'Teacher',
    'TimmTeacher',
    'Tower',
    'build_teacher',
    'find_register_neurons',
    'teacher_config',
]
