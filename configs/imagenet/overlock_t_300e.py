_base_ = [
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/adamw.py',
    '../_base_/mmpretrain_runtime.py',
]

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(
        type='OverLoCK', arch='t', drop_path_rate=0.15, classifier=True
    ),
    head=dict(
        type='OverLoCKClsHead',
        num_classes=1000,
        in_channels=[512, 640],
        loss=dict(
            type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
        ),
    ),
    train_cfg=dict(
        augments=[
            dict(type='Mixup', alpha=0.8),
            dict(type='CutMix', alpha=1.0),
        ]
    ),
)

test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 235  # 224 / 0.95
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0)
)
# Statistics of batch norms are averaged too: they belong to the weights.
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ForeachExponentialMovingAverage',
        momentum=1e-4,
        update_buffers=True,
        priority='ABOVE_NORMAL',
    )
]
