// Command gen writes the bookshop's catalogue: made-up books that look real, the same ones each time. Their ISBNs have valid check digits and lie in
// 979-9, which no country has been given, so that no real book is meant.
package main

import (
	"encoding/csv"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
)

const books = 1200

var (
	given = []string{
		"Adaeze", "Agnes", "Akira", "Alma", "Amara", "Anders", "Anton", "Aroha", "Beatriz", "Benedikt", "Blanca", "Bruno", "Camille", "Carys", "Chidi", "Clara",
		"Dagmar", "Daniel", "Darya", "Diego", "Edith", "Eero", "Elif", "Emeka", "Esther", "Farid", "Fatima", "Felix", "Freya", "Gideon", "Greta", "Hana", "Hugo",
		"Ines", "Ingrid", "Ivo", "Jamal", "Jana", "Johan", "Kaito", "Karin", "Leila", "Linus", "Lucia", "Magnus", "Mara", "Mateo", "Mei", "Milan", "Nadia", "Niamh",
		"Noor", "Olga", "Omar", "Oskar", "Paloma", "Pavel", "Priya", "Quentin", "Rafael", "Renata", "Rosa", "Ruth", "Samir", "Sanna", "Selma", "Tariq", "Tomas",
		"Ulla", "Vera", "Viktor", "Wanda", "Xavier", "Yara", "Yusuf", "Zofia",
	}
	family = []string{
		"Abara", "Almeida", "Andersson", "Arslan", "Bakker", "Baptiste", "Bergström", "Bianchi", "Castellanos", "Chandra", "Conteh", "Dahl", "Delgado", "Dubois",
		"Eriksen", "Falk", "Ferreira", "Fischer", "Fujita", "Gallagher", "Haddad", "Halvorsen", "Hartmann", "Holm", "Ibrahim", "Ivanova", "Jansen", "Kamau",
		"Karlsson", "Keller", "Kimura", "Kowalska", "Kruger", "Laurent", "Lindqvist", "Lopes", "Macleod", "Marchetti", "Mensah", "Moreau", "Nakamura", "Navarro",
		"Novak", "O'Brien", "Okafor", "Olsen", "Osei", "Papadakis", "Pereira", "Petrov", "Quist", "Rahman", "Richter", "Romero", "Sato", "Schmid", "Sørensen",
		"Takahashi", "Thorne", "Tran", "Ueda", "Vasquez", "Vogel", "Watanabe", "Weiss", "Yilmaz", "Zhang", "Zimmer",
	}
	publishers = []string{
		"Alder & Birch", "Blackthorn House", "Canal Street Books", "Corvid Press", "Driftwood Editions", "Fathom", "Greyfriars University Press", "Hazel Tree",
		"Lantern Row", "Meridian & Sons", "North Quay", "Pollard Press", "Sixpenny", "Tollgate Academic", "Weir Lane",
	}
	places = []string{
		"Antwerp", "Bergen", "Bohemia", "Cádiz", "Galway", "Hokkaido", "Istria", "Karelia", "Lagos", "Lisbon", "Malta", "Odessa", "Oaxaca", "Patagonia", "Porto",
		"Riga", "Samarkand", "Sardinia", "Tangier", "Trieste", "Valparaíso", "Zanzibar",
	}
	things = []string{
		"Almanac", "Apiary", "Archive", "Bellfounder", "Cartographer", "Clockmaker", "Coppice", "Estuary", "Ferryman", "Foundry", "Glacier", "Harbour", "Hedgerow",
		"Herbarium", "Lamplighter", "Library", "Lighthouse", "Locksmith", "Magpie", "Mill", "Observatory", "Orchard", "Quarry", "Railway", "Reservoir", "River",
		"Sawmill", "Signal Box", "Tannery", "Tide", "Vineyard", "Weaver", "Winter Garden", "Woodcutter",
	}
	moods  = []string{"Borrowed", "Crooked", "Distant", "Drowned", "Emerald", "Faithless", "Forgotten", "Hollow", "Last", "Long", "Midnight", "Northern", "Paper", "Patient", "Quiet", "Salt", "Second", "Silent", "Small", "Unmapped", "Unwritten", "Wandering"}
	crafts = []string{
		"Bread", "Bicycles", "Bookbinding", "Cheese", "Coppicing", "Drystone Walls", "Fermentation", "Furniture", "Kitchen Gardens", "Letterpress", "Mushrooms", "Natural Dyes",
		"Soap", "Timber Frames", "Wild Swimming", "Woodcarving",
	}
	fields = []string{
		"Agreement", "Compilers", "Consensus", "Databases", "Distributed Systems", "Fault Tolerance", "Graph Theory", "Hashing", "Networks", "Operating Systems", "Queueing",
		"Scheduling", "Statistics", "Storage", "Type Systems", "Voting",
	}
	sciences = []string{"Auroras", "Bees", "Birdsong", "Deep Seas", "Earthquakes", "Fungi", "Glass", "Ice", "Light", "Moss", "Numbers", "Rivers", "Seeds", "Sleep", "Stars", "Tides", "Trees", "Weather"}
)

// kinds make a title and its subject.
var kinds = []struct {
	subject string
	low     int // price in cents
	high    int
	title   func(r *rand.Rand) string
}{
	{"Fiction", 899, 2499, func(r *rand.Rand) string { return "The " + pick(r, moods) + " " + pick(r, things) }},
	{"Fiction", 899, 2499, func(r *rand.Rand) string { return "A " + pick(r, things) + " in " + pick(r, places) }},
	{"Fiction", 899, 2199, func(r *rand.Rand) string { return "The " + pick(r, things) + "'s Daughter" }},
	{"Crime", 799, 1899, func(r *rand.Rand) string { return "Death at the " + pick(r, moods) + " " + pick(r, things) }},
	{"Crime", 799, 1899, func(r *rand.Rand) string { return "The " + pick(r, places) + " Affair" }},
	{"Travel", 1299, 2999, func(r *rand.Rand) string { return "Slow Roads to " + pick(r, places) }},
	{"Travel", 1299, 2999, func(r *rand.Rand) string {
		return fmt.Sprintf("%s in %d Walks", pick(r, places), 12+r.IntN(30))
	}},
	{"History", 1599, 3999, func(r *rand.Rand) string { return pick(r, places) + ": A History" }},
	{"History", 1599, 3999, func(r *rand.Rand) string {
		return fmt.Sprintf("The %s and the %s, %d–%d", pick(r, things), pick(r, things), 1500+r.IntN(200), 1700+r.IntN(220))
	}},
	{"Craft", 1499, 3499, func(r *rand.Rand) string { return pick(r, crafts) + " for Beginners" }},
	{"Craft", 1499, 3499, func(r *rand.Rand) string { return "The Complete Book of " + pick(r, crafts) }},
	{"Computing", 2999, 8999, func(r *rand.Rand) string { return pick(r, fields) + ": Principles and Practice" }},
	{"Computing", 2999, 8999, func(r *rand.Rand) string { return "An Introduction to " + pick(r, fields) }},
	{"Computing", 2499, 6999, func(r *rand.Rand) string { return pick(r, fields) + " by Example" }},
	{"Nature", 1299, 2999, func(r *rand.Rand) string { return "The Secret Life of " + pick(r, sciences) }},
	{"Science", 1499, 3499, func(r *rand.Rand) string { return "On " + pick(r, sciences) }},
	{"Poetry", 699, 1499, func(r *rand.Rand) string { return pick(r, moods) + " " + pick(r, sciences) }},
	{"Children", 599, 1299, func(r *rand.Rand) string {
		return pick(r, given) + " and the " + pick(r, moods) + " " + pick(r, things)
	}},
}

func pick(r *rand.Rand, from []string) string { return from[r.IntN(len(from))] }

// isbn makes the n-th ISBN-13 of 979-9.
func isbn(n int) string {
	digits := fmt.Sprintf("9799%08d", 1000_0007+n*73_129%89_000_000)
	sum := 0
	for i, d := range digits {
		sum += int(d-'0') * (1 + 2*(i%2))
	}
	return digits + strconv.Itoa((10-sum%10)%10)
}

func main() {
	if err := write("catalogue.csv"); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

func write(path string) error {
	r := rand.New(rand.NewPCG(1, 2026))
	rows := [][]string{{"isbn", "title", "author", "subject", "year", "publisher", "price_cents", "stock"}}
	titles, seen := map[string]bool{}, map[string]bool{}
	for len(rows) <= books {
		kind := kinds[r.IntN(len(kinds))]
		title, code := kind.title(r), isbn(len(rows))
		if titles[title] || seen[code] {
			titles[title] = true
			title = fmt.Sprintf("%s (Volume %d)", title, 2+r.IntN(4))
			if titles[title] || seen[code] {
				continue
			}
		}
		titles[title], seen[code] = true, true
		price := (kind.low+r.IntN(kind.high-kind.low))/100*100 + 99
		rows = append(rows, []string{
			code, title, pick(r, given) + " " + pick(r, family), kind.subject, strconv.Itoa(1968 + r.IntN(58)), pick(r, publishers), strconv.Itoa(price),
			strconv.Itoa(20 + r.IntN(480)),
		})
	}
	slices.SortFunc(rows[1:], func(a, b []string) int { return slices.Compare(a[:1], b[:1]) })
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := csv.NewWriter(f)
	if err := w.WriteAll(rows); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return f.Close()
}
