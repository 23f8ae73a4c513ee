_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance_ms_crop.py',
    '../_base_/schedules/3x.py',
    '../_base_/adamw.py',
    '../_base_/mmdet_runtime.py',
]

model = dict(
    backbone=dict(
        type='OverLoCK',
        arch='t',
        drop_path_rate=0.2,
        fuse_overview=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/'
            'download/v1/overlock_t_in1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[64, 128, 384, 640]),
)

optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
sync_bn = 'torch'
