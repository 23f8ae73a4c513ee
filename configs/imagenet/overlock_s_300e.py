_base_ = 'overlock_t_300e.py'

model = dict(backbone=dict(arch='s', drop_path_rate=0.4))
