_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

custom_imports = dict(
    imports=['mmoverlock.engine'], allow_failed_imports=False
)

# This FPN has no use for the map at stride 4: it is not made.
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
    neck=dict(in_channels=[128, 384, 640], start_level=0),
)

optim_wrapper = dict(
    constructor='GroupedOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdamW',
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.05,
        fused=True,
    ),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
sync_bn = 'torch'
