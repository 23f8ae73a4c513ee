_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'

custom_imports = dict(
    imports=['mmoverlock.engine'], allow_failed_imports=False
)

model = dict(
    backbone=dict(
        _delete_=True,
        type='OverLoCK',
        arch='t',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/'
            'download/v1/overlock_t_in1k_224.pth',
        ),
    ),
    panoptic_head=dict(in_channels=[64, 128, 384, 640]),
)

optim_wrapper = dict(
    constructor='GroupedOptimWrapperConstructor',
    optimizer=dict(fused=True),
)
sync_bn = 'torch'
