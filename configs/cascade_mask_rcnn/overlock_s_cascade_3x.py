_base_ = 'overlock_t_cascade_3x.py'

model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.4,
        init_cfg=dict(
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/'
            'download/v1/overlock_s_in1k_224.pth'
        ),
    ),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
