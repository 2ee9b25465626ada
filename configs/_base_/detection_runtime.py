_base_ = './default_runtime.py'
default_scope = 'mmdet'

visualizer = dict(type='DetLocalVisualizer')
default_hooks = dict(visualization=dict(type='DetVisualizationHook'))
