"""What prompts call the classes of public data sets, where that differs from the names in their files."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MNIST: Mapping[str, str] = MappingProxyType(
    {
        "0 - zero": "0",
        "1 - one": "1",
        "2 - two": "2",
        "3 - three": "3",
        "4 - four": "4",
        "5 - five": "5",
        "6 - six": "6",
        "7 - seven": "7",
        "8 - eight": "8",
        "9 - nine": "9",
    }
)

FASHION_MNIST: Mapping[str, str] = MappingProxyType(
    {
        "T-shirt/top": "t-shirt",
        "Trouser": "pair of trousers",
        "Pullover": "pullover",
        "Dress": "dress",
        "Coat": "coat",
        "Sandal": "sandal",
        "Shirt": "shirt",
        "Sneaker": "sneaker",
        "Bag": "bag",
        "Ankle boot": "ankle boot",
    }
)

EUROSAT: Mapping[str, str] = MappingProxyType(
    {
        "AnnualCrop": "annual crop land",
        "Forest": "forest",
        "HerbaceousVegetation": "brushland or shrubland",
        "Highway": "highway or road",
        "Industrial": "industrial buildings",
        "Pasture": "pasture land",
        "PermanentCrop": "permanent crop land",
        "Residential": "residential buildings",
        "River": "river",
        "SeaLake": "sea or lake",
    }
)

CALTECH101: Mapping[str, str] = MappingProxyType(
    {
        "Faces": "off-center face",
        "Faces_easy": "centered face",
        "Leopards": "leopard",
        "Motorbikes": "motorbike",
        "airplanes": "airplane",
        "car_side": "side of a car",
        "water_lilly": "water lily",
        "yin_yang": "yin and yang symbol",
    }
)

FLOWERS102: Mapping[str, str] = MappingProxyType({"pink-yellow dahlia?": "pink-yellow dahlia"})

# By WordNet's id: classes whose first synonym means something else on its own ("walking stick", an insect here) or is
# rare. The names are other synonyms, or those that CLIP's prompts for ImageNet use (github.com/openai/CLIP, notebooks).
TINY_IMAGENET: Mapping[str, str] = MappingProxyType(
    {
        "n01774384": "black widow spider",
        "n02123045": "tabby cat",
        "n02231487": "stick insect",
        "n02236044": "praying mantis",
        "n02279972": "monarch butterfly",
        "n02415577": "bighorn sheep",
        "n02509815": "red panda",
        "n02814533": "station wagon",
        "n02814860": "lighthouse",
        "n02892201": "brass memorial plaque",
        "n03014705": "storage chest",
        "n03089624": "candy store",
        "n03126707": "construction crane",
        "n03424325": "gas mask",
        "n03599486": "rickshaw",
        "n03804744": "metal nail",
        "n03854065": "pipe organ",
        "n03902125": "payphone",
        "n04008634": "missile",
        "n04067472": "fishing reel",
        "n04399382": "teddy bear",
        "n09193705": "mountain",
    }
)

# Folders are named after countries' ISO 3166 codes (and XK).
_COUNTRIES = """
AD Andorra; AE United Arab Emirates; AF Afghanistan; AG Antigua and Barbuda; AI Anguilla; AL Albania; AM Armenia;
AO Angola; AQ Antarctica; AR Argentina; AS American Samoa; AT Austria; AU Australia; AW Aruba; AX Aland Islands;
AZ Azerbaijan; BA Bosnia and Herzegovina; BB Barbados; BD Bangladesh; BE Belgium; BF Burkina Faso; BG Bulgaria;
BH Bahrain; BI Burundi; BJ Benin; BL Saint Barthelemy; BM Bermuda; BN Brunei; BO Bolivia;
BQ Bonaire, Saint Eustatius and Saba; BR Brazil; BS Bahamas; BT Bhutan; BW Botswana; BY Belarus; BZ Belize; CA Canada;
CC Cocos Islands; CD DR Congo; CF Central African Republic; CG Republic of the Congo; CH Switzerland; CI Ivory Coast;
CK Cook Islands; CL Chile; CM Cameroon; CN China; CO Colombia; CR Costa Rica; CU Cuba; CV Cape Verde; CW Curacao;
CX Christmas Island; CY Cyprus; CZ Czech Republic; DE Germany; DJ Djibouti; DK Denmark; DM Dominica;
DO Dominican Republic; DZ Algeria; EC Ecuador; EE Estonia; EG Egypt; EH Western Sahara; ER Eritrea; ES Spain;
ET Ethiopia; FI Finland; FJ Fiji; FK Falkland Islands; FM Micronesia; FO Faroe Islands; FR France; GA Gabon;
GB United Kingdom; GD Grenada; GE Georgia; GF French Guiana; GG Guernsey; GH Ghana; GI Gibraltar; GL Greenland;
GM Gambia; GN Guinea; GP Guadeloupe; GQ Equatorial Guinea; GR Greece; GS South Georgia and South Sandwich Islands;
GT Guatemala; GU Guam; GW Guinea-Bissau; GY Guyana; HK Hong Kong; HN Honduras; HR Croatia; HT Haiti; HU Hungary;
ID Indonesia; IE Ireland; IL Israel; IM Isle of Man; IN India; IO British Indian Ocean Territory; IQ Iraq; IR Iran;
IS Iceland; IT Italy; JE Jersey; JM Jamaica; JO Jordan; JP Japan; KE Kenya; KG Kyrgyzstan; KH Cambodia; KI Kiribati;
KM Comoros; KN Saint Kitts and Nevis; KP North Korea; KR South Korea; KW Kuwait; KY Cayman Islands; KZ Kazakhstan;
LA Laos; LB Lebanon; LC Saint Lucia; LI Liechtenstein; LK Sri Lanka; LR Liberia; LS Lesotho; LT Lithuania;
LU Luxembourg; LV Latvia; LY Libya; MA Morocco; MC Monaco; MD Moldova; ME Montenegro; MF Saint Martin; MG Madagascar;
MH Marshall Islands; MK North Macedonia; ML Mali; MM Myanmar; MN Mongolia; MO Macau; MP Northern Mariana Islands;
MQ Martinique; MR Mauritania; MS Montserrat; MT Malta; MU Mauritius; MV Maldives; MW Malawi; MX Mexico; MY Malaysia;
MZ Mozambique; NA Namibia; NC New Caledonia; NE Niger; NF Norfolk Island; NG Nigeria; NI Nicaragua; NL Netherlands;
NO Norway; NP Nepal; NR Nauru; NU Niue; NZ New Zealand; OM Oman; PA Panama; PE Peru; PF French Polynesia;
PG Papua New Guinea; PH Philippines; PK Pakistan; PL Poland; PM Saint Pierre and Miquelon; PN Pitcairn Islands;
PR Puerto Rico; PS Palestine; PT Portugal; PW Palau; PY Paraguay; QA Qatar; RE Reunion; RO Romania; RS Serbia;
RU Russia; RW Rwanda; SA Saudi Arabia; SB Solomon Islands; SC Seychelles; SD Sudan; SE Sweden; SG Singapore;
SH Saint Helena; SI Slovenia; SJ Svalbard and Jan Mayen; SK Slovakia; SL Sierra Leone; SM San Marino; SN Senegal;
SO Somalia; SR Suriname; SS South Sudan; ST Sao Tome and Principe; SV El Salvador; SX Sint Maarten; SY Syria;
SZ Eswatini; TC Turks and Caicos Islands; TD Chad; TF French Southern Territories; TG Togo; TH Thailand;
TJ Tajikistan; TK Tokelau; TL Timor-Leste; TM Turkmenistan; TN Tunisia; TO Tonga; TR Turkey; TT Trinidad and Tobago;
TV Tuvalu; TW Taiwan; TZ Tanzania; UA Ukraine; UG Uganda; US United States; UY Uruguay; UZ Uzbekistan; VA Vatican;
VC Saint Vincent and the Grenadines; VE Venezuela; VG British Virgin Islands; VI United States Virgin Islands;
VN Vietnam; VU Vanuatu; WF Wallis and Futuna; WS Samoa; XK Kosovo; YE Yemen; YT Mayotte; ZA South Africa; ZM Zambia;
ZW Zimbabwe
"""

COUNTRY211: Mapping[str, str] = MappingProxyType(
    {entry.strip()[:2]: entry.strip()[3:] for entry in _COUNTRIES.split(";")}
)
