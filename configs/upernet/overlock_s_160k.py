_base_ = 'overlock_t_160k.py'

model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.3,
        init_cfg=dict(
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/'
            'download/v1/overlock_s_in1k_224.pth'
        ),
    ),
    decode_head=dict(in_channels=[64, 128, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)
