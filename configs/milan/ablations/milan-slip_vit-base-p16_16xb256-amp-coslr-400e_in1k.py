# SLIP ViT-B/16 as the teacher, from its published file (table 5, row 9).
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    head=dict(
        teacher=dict(
            _delete_=True,
            type='mmmilan.TimmTeacher',
            model='vit_base_patch16_224',
            pretrained='checkpoints/slip_base_100ep.pt',
        )
    ),
)
