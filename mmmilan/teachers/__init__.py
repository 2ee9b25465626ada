from mmmilan.teachers.base import Teacher, Tower
from mmmilan.teachers.by_name import build_teacher, teacher_config
from mmmilan.teachers.cache import LoadImportance, TeacherCache
from mmmilan.teachers.open_clip import OpenCLIPTeacher
from mmmilan.teachers.registers import find_register_neurons
from mmmilan.teachers.timm import TimmTeacher

__all__ = [
    'LoadImportance',
    'OpenCLIPTeacher',
    'Teacher',
    'TeacherCache',
    'TimmTeacher',
    'Tower',
    'build_teacher',
    'find_register_neurons',
    'teacher_config',
]
