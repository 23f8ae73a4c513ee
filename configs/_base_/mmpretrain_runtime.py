_base_ = 'default_runtime.py'

custom_imports = dict(
    imports=['mmoverlock.engine', 'mmoverlock.models.classification'],
    allow_failed_imports=False,
)
default_scope = 'mmpretrain'
default_hooks = dict(visualization=dict(type='VisualizationHook'))
visualizer = dict(
    type='UniversalVisualizer',
    name='visualizer',
    vis_backends=[dict(type='LocalVisBackend')],
)
