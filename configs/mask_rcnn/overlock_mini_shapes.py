# Learns the drawn objects of tools/make_sample_data.py from scratch, on a CPU,
# in minutes: `make demo`.
_base_ = 'overlock_xt_1x.py'

data_root = 'data/shapes/'
# The five categories of COCO that are drawn.
metainfo = dict(
    classes=('airplane', 'sports ball', 'banana', 'pizza', 'remote')
)
num_classes = 5
epochs = 11
norm_cfg = dict(type='BN')

model = dict(
    backbone=dict(
        _delete_=True,
        type='OverLoCK',
        arch=dict(
            depths=(1, 1, 1, 1),
            channels=(32, 64, 128, 192),
            focus_depths=(2, 1),
            focus_heads=(2, 4),
        ),
        fuse_overview=True,
        deploy=True,  # one kernel in place of seven branches, from the start
    ),
    neck=dict(
        in_channels=[32, 64, 176, 240], out_channels=64, norm_cfg=norm_cfg
    ),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=64, finest_scale=32, roi_layer=dict(sampling_ratio=1)
        ),
        bbox_head=dict(
            in_channels=64,
            fc_out_channels=256,
            num_classes=num_classes,
            reg_class_agnostic=True,
            loss_bbox=dict(loss_weight=0.5),
        ),
        mask_roi_extractor=dict(
            out_channels=64, finest_scale=32, roi_layer=dict(sampling_ratio=1)
        ),
        mask_head=dict(
            num_convs=2,
            in_channels=64,
            conv_out_channels=64,
            num_classes=num_classes,
            class_agnostic=True,
            norm_cfg=norm_cfg,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        # Few regions, half of them objects: classes are what is hard here.
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(160, 160), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (160, 160)

train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        filter_cfg=dict(min_size=0),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    dataset=dict(
        data_root=data_root, metainfo=metainfo, pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(max_epochs=epochs, val_interval=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min=0,
        begin=0,
        end=epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(save_best='coco/segm_mAP_50')
)
