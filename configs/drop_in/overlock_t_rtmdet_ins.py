_base_ = 'mmdet::rtmdet/rtmdet-ins_l_8xb32-300e_coco.py'

custom_imports = dict(
    imports=['mmoverlock.engine'], allow_failed_imports=False
)

model = dict(
    # OverLoCK's weights want RGB; those of RTMDet's own backbone, BGR.
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
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
auto_scale_lr = dict(base_batch_size=256)  # 8 GPUs with 32 images each
