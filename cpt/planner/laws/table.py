"""The laws by name. A new law is one file and one line here."""

from cpt.planner.laws.additive import ADDITIVE
from cpt.planner.laws.chinchilla import CHINCHILLA
from cpt.planner.laws.cmr import CMR
from cpt.planner.laws.cpt_dynamics import CPT_DYNAMICS
from cpt.planner.laws.dcpt import DCPT, L1, L5
from cpt.planner.laws.forgetting import FORGETTING
from cpt.planner.laws.law import Law
from cpt.planner.laws.mixing import MIXING
from cpt.planner.laws.power_transfer import POWER_TRANSFER
from cpt.planner.laws.regmix import REGMIX

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        DCPT,
        L1,
        L5,
        CMR,
        CPT_DYNAMICS,
        FORGETTING,
        MIXING,
        ADDITIVE,
        POWER_TRANSFER,
        REGMIX,
        CHINCHILLA,
    )
}
