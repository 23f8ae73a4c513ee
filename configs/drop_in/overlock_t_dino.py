_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

custom_imports = dict(
    imports=['mmoverlock.engine'], allow_failed_imports=False
)

model = dict(
    backbone=dict(
        _delete_=True,
        type='OverLoCK',
        arch='t',
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/'
            'download/v1/overlock_t_in1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[128, 384, 640]),
)

optim_wrapper = dict(
    constructor='GroupedOptimWrapperConstructor',
    optimizer=dict(fused=True),
)
sync_bn = 'torch'
