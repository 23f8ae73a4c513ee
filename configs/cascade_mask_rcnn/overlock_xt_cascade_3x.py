_base_ = 'overlock_t_cascade_3x.py'

model = dict(
    backbone=dict(
        arch='xt',
        drop_path_rate=0.1,
        init_cfg=dict(
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/'
            'download/v1/overlock_xt_in1k_224.pth'
        ),
    ),
    neck=dict(in_channels=[56, 112, 340, 420]),
)
